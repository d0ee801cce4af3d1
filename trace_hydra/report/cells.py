"""Numbers and tables as a page shows them; a missing number says why it is missing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MINUS = "\N{MINUS SIGN}"
NONE = "–"


@dataclass(frozen=True)
class Cell:
    """A cell of a table."""

    text: str
    value: float | None = None
    """What the column is sorted by, full precision; None: by the text."""
    why: str = ""
    """Why there is no number."""
    style: str = ""
    """Classes of CSS, separated by blanks."""
    href: str = ""
    """A relative address."""
    more: str = ""
    """What stands below in small print, an interval say."""


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    label: str
    """May be markup of ours."""
    hint: str = ""
    """What it means, its unit; shown below the label."""
    numeric: bool = True
    filter: bool = False
    """Whether readers may choose among its values."""


@dataclass(frozen=True)
class Grid:
    """A table with a caption."""

    name: str
    """Id on its page."""
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    sortable: bool = False
    notes: Sequence[str] = field(default_factory=tuple)


def number(value: float | None, why: str = "", *, digits: int = 2, sign: bool = False, style: str = "") -> Cell:
    """Show a number; None as a dash with the reason."""
    if value is None:
        return Cell(NONE, None, why or "not known", style)
    return Cell(figure(value, digits=digits, sign=sign), float(value), "", style)


def figure(value: float, *, digits: int = 2, sign: bool = False) -> str:
    """Write a number with a real minus sign; what rounds to 0 has none."""
    text = f"{value:+,.{digits}f}" if sign else f"{value:,.{digits}f}"
    if not text.strip("+-0.,"):
        return text.lstrip("+-")
    return text.replace("-", MINUS)


def count(value: float | None, why: str = "") -> Cell:
    """Show a whole number."""
    return number(value, why, digits=0)


def text(value: object, style: str = "") -> Cell:
    """Show text."""
    return Cell(str(value), style=style)


def between(ends: Sequence[float | None] | None, *, sign: bool = False) -> str:
    """Write an interval; nothing where there is none."""
    if not ends or ends[0] is None or ends[1] is None:
        return ""
    return f"{figure(ends[0], sign=sign)} to {figure(ends[1], sign=sign)}"


def seconds(value: float | None) -> Cell:
    """Show a duration."""
    if value is None:
        return number(None)
    hours, rest = divmod(round(value), 3600)
    if value < 120:
        return Cell(f"{value:.1f} s", value)
    return Cell(f"{hours} h {rest // 60:02d} min" if hours else f"{rest // 60} min {rest % 60:02d} s", value)


def mapping(value: Any) -> Mapping[str, Any]:
    """Take a mapping as it is and anything else, as older or damaged results may hold, as an empty one."""
    return value if isinstance(value, Mapping) else {}
