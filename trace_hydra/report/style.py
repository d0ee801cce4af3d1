"""How figures look, and how they become files."""

import functools
import io
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

from matplotlib.figure import Figure
from matplotlib.style import context

from trace_hydra.report.hostile import plain

P = ParamSpec("P")
R = TypeVar("R")
FORMATS = ("svg", "pdf", "png")
INK, QUIET, FAINT = "#1f1f1f", "#6b6b6b", "#d0d0d0"
"""Text and lines of the first, second and third rank; the first two have a contrast of 4.5 and more to white."""
BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
"""Of Okabe and Ito (2008)."""
TASK_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, "#e69f00", "#56b4e9")
Label = tuple[float, float, str, str]
"""A text beside a point: its place in data, the text, its colour."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")
DPI = 200
_STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica", "sans-serif"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.edgecolor": QUIET,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "axes.labelcolor": INK,
    "text.parse_math": False,  # a $ in a name is a dollar
    "text.usetex": False,
    "svg.fonttype": "none",  # text stays text: searchable, read aloud, set in the page's colours
    "svg.hashsalt": "trace_hydra",
    "pdf.fonttype": 42,
    "axes.unicode_minus": True,
}


def drawn(draw: Callable[P, R]) -> Callable[P, R]:
    """Draw in our style, whatever matplotlib's settings are; they are as before afterwards."""

    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> R:
        with context(["default", _STYLE]):
            return draw(*args, **kwargs)

    return styled


def new_figure(width: float, height: float) -> Figure:
    """Make a figure of its own, in inches; pyplot would keep it for the whole process."""
    return Figure(figsize=(width, height), layout="constrained")


@drawn
def to_bytes(figure: Figure, kind: str, *, transparent: bool = False) -> bytes:
    """Render a figure; the same figure gives the same bytes.

    Args:
        figure: From a function of `figures`.
        kind: Out of `FORMATS`; `png` has `DPI` dots an inch.
        transparent: Without the white ground, for pages with a colour of their own.
    """
    nothing = {"svg": ("Date", "Creator"), "pdf": ("CreationDate", "Creator", "Producer"), "png": ("Software",)}[kind]
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=DPI, transparent=transparent, metadata=dict.fromkeys(nothing))
    return buffer.getvalue()


def short(text: object, most: int = 200) -> str:
    """Show a name on one line in at most so many characters, spelled out ones counted."""
    shown = plain(text, most)
    return shown if len(shown) <= most + 1 else f"{shown[:most]}…"


def signed(value: float, decimals: int = 1) -> str:
    """Write a difference with its sign, a real minus and no -0."""
    text = f"{value:+.{decimals}f}"
    return text.replace("-", "\u2212") if float(text) else f"{0:.{decimals}f}"


def error_ends(value: float, low: float | None, high: float | None) -> list[list[float]] | None:
    """Give what `errorbar` takes for one point; None without an interval."""
    return None if low is None or high is None else [[max(value - low, 0.0)], [max(high - value, 0.0)]]


def label_rows(axes: Any, labels: Sequence[str]) -> None:
    """Name the rows of a chart that is read from top to bottom."""
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)


def place_labels(figure: Figure, axes: Any, labels: Sequence[Label]) -> None:
    """Write texts beside points, each on the side where it covers the fewest points and other texts."""
    figure.draw_without_rendering()  # only now it is known where the points lie, and there they must stay
    figure.set_layout_engine("none")
    points = [tuple(axes.transData.transform((across, up))) for across, up, *_ in labels]
    scale = figure.dpi / 72
    taken = [(x - 4 * scale, y - 4 * scale, x + 4 * scale, y + 4 * scale) for x, y in points]
    frame = axes.bbox.extents
    for (across, up, text, colour), (x, y) in zip(labels, points, strict=True):
        width, height = 4.3 * len(text) * scale, 8 * scale
        best = None
        for right, above in ((1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1), (1, 2), (1, -2), (-1, 2), (-1, -2)):
            left = x + right * 6 * scale - width * (0.5 if not right else right < 0)
            low = y + above * 5 * scale - height * (above < 0)
            box = (left, low, left + width, low + height)
            outside = sum(
                max(0.0, by) for by in (frame[0] - box[0], box[2] - frame[2], frame[1] - box[1], box[3] - frame[3])
            )
            cost = sum(_overlap(box, other) for other in taken) + 20 * outside
            if best is None or cost < best[0]:
                best = (cost, right, above, box)
        if best is not None:
            _, right, above, box = best
            taken.append(box)
            axes.annotate(
                text, (across, up), xytext=(6 * right, 5 * above), textcoords="offset points", fontsize=7, color=colour,
                ha=("center", "left", "right")[right], va="bottom" if above > 0 else "top", annotation_clip=False,
            )  # fmt: skip


def _overlap(one: Sequence[float], other: Sequence[float]) -> float:
    across = min(one[2], other[2]) - max(one[0], other[0])
    up = min(one[3], other[3]) - max(one[1], other[1])
    return across * up if across > 0 and up > 0 else 0.0
