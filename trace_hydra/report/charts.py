"""Figures as inline SVG: no ids in common, colours of the page's theme, a text alternative."""

import re
from xml.etree import ElementTree

from markupsafe import Markup, escape
from matplotlib.figure import Figure

from trace_hydra.report.style import FAINT, INK, QUIET, to_bytes

_POINTS_TO_PIXELS = 4 / 3
# Ink and paper of a figure follow the page; every other colour is its own.
_THEME = {
    "#000000": "currentColor",
    INK: "currentColor",
    QUIET: "var(--quiet)",
    FAINT: "var(--line)",
    "#ffffff": "var(--paper)",
}
_COLOUR = re.compile(r"((?:fill|stroke): ?)(#[0-9a-f]{6})\b", re.IGNORECASE)


def inline(figure: Figure, name: str, title: str, description: str) -> Markup:
    """Draw a figure as an `svg` element to be put into a page.

    Args:
        figure: Any; its fonts become the page's.
        name: Of the figure on its page; every id begins with it.
        title: What a screen reader says first.
        description: What is to be seen, and where its numbers stand as a table.
    """
    root = ElementTree.fromstring(to_bytes(figure, "svg", transparent=True))
    for element in root.iter():
        element.tag = _local(element.tag)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in ("metadata", "style"):  # a style would hold for the whole page
                parent.remove(child)
        parent.attrib = {_local(key): _attribute(_local(key), value, name) for key, value in parent.attrib.items()}
    *_, width, height = (float(part) * _POINTS_TO_PIXELS for part in root.attrib["viewBox"].split())
    root.set("width", f"{width:.0f}")
    root.set("height", f"{height:.0f}")
    for key, value in (("role", "img"), ("aria-labelledby", f"{name}-title {name}-desc"), ("focusable", "false")):
        root.set(key, value)
    root.attrib.pop("version", None)
    text = ElementTree.tostring(root, encoding="unicode")
    head, tag, rest = text.partition(">")
    said = f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(description)}</desc>'
    return Markup(f"{head}{tag}{said}{rest}")  # what matplotlib wrote is escaped already


def _attribute(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == "href" and value.startswith("#"):
        return f"#{name}-{value[1:]}"
    value = value.replace("url(#", f"url(#{name}-")
    return _COLOUR.sub(lambda match: match[1] + _THEME.get(match[2].lower(), match[2]), value)


def _local(name: str) -> str:
    """Leave out a name's namespace, which HTML knows by itself."""
    return name.rpartition("}")[2]
