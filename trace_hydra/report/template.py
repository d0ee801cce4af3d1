"""Templates of pages: whatever is put into them is escaped, and what is invisible is spelled out."""

import base64
import functools
import hashlib
import logging
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from trace_hydra.report.hostile import shown

log = logging.getLogger(__name__)

_TEMPLATES = Path(__file__).parent / "templates"
_LONGEST = 100_000
"""Characters of one text on a page, whatever wants to be shown."""


def drawn(kind: str, *arguments: Any, name: str = "", title: str, described: str, **options: Any) -> Markup:
    """Draw a figure of `report.figures` into a page; where that fails, say so: a page is not lost for a figure.

    Args:
        kind: Name of the function.
        arguments: Its arguments.
        name: Of the figure on its page; default: the kind.
        title: What a screen reader says first.
        described: What is to be seen, and where the numbers stand.
        options: More of its arguments.
    """
    from trace_hydra.report import charts, figures  # matplotlib takes a while to load

    try:
        figure = getattr(figures, kind)(*arguments, **options)
        return charts.inline(figure, name or kind.replace("_", "-"), title, described)
    except Exception:  # results may be older or damaged in ways that a figure does not expect
        log.exception("figure %s", kind)
        return Markup("<p>This figure could not be drawn; its numbers stand in the table.</p>")


def render(template: str, **values: Any) -> str:
    """Fill a template; whatever is put into it is escaped, and what is invisible is spelled out."""
    style, script = _asset("page.css"), _asset("page.js")
    return (
        _environment()
        .get_template(template)
        .render(
            style=Markup(style),
            script=Markup(script),
            style_hash=Markup(_hash(style)),
            script_hash=Markup(_hash(script)),
            **values,
        )
    )


@functools.cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: shown(value, _LONGEST).text if type(value) is str else value,
    )


@functools.cache
def _asset(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    """Name an inline style or script in a Content-Security-Policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
