"""The score matrix as a heat map."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from trace_hydra.callbacks.table import row_label

DPI = 150
CELL = (0.95, 0.5)
"""Width and height of a cell in inches; room for `100.0`."""
MARGIN = (2.9, 2.1)
"""Inches beside the cells: row labels and colour bar; title and task names."""


def figure_size(num_tasks: int) -> tuple[float, float]:
    """Give width and height in inches for T tasks: T columns, T+1 rows."""
    return MARGIN[0] + CELL[0] * num_tasks, MARGIN[1] + CELL[1] * (num_tasks + 1)


def heat_map_title(model: str, method: str, task_order: str, protocol: str, fingerprint: str) -> str:
    """Say what a heat map shows, in two lines."""
    return f"{model} · {method} · order {task_order}\nprotocol {protocol} {fingerprint}"


def heat_map_png(tasks: Sequence[str], rows: Sequence[Sequence[float | None]], title: str) -> bytes:
    """Draw the matrix as a PNG of `figure_size` times `DPI` pixels; arguments as of `heat_map_figure`."""
    buffer = io.BytesIO()
    heat_map_figure(tasks, rows, title).savefig(buffer, format="png")
    return buffer.getvalue()


def heat_map_figure(
    tasks: Sequence[str],
    rows: Sequence[Sequence[float | None]],
    title: str,
    *,
    intervals: Mapping[tuple[int, str], Sequence[float]] | None = None,
    difference: bool = False,
) -> Any:
    """Draw the matrix: rows over stages, the diagonal outlined, unscored cells hatched.

    Args:
        tasks: The T columns, in training order.
        rows: T+1 rows of T scores on the 0-100 scale, None where not scored.
        title: Printed above, may hold line breaks.
        intervals: (row, task) -> low and high, printed below the score.
        difference: The cells are differences of scores, in points: signed, coloured from 0 both ways.

    Returns:
        A matplotlib Figure.
    """
    # pyplot keeps figures and a backend for the whole process; a Figure of its own does not.
    from matplotlib.figure import Figure

    width, height = figure_size(len(tasks))
    longest = max(map(len, tasks))
    room = max(0, longest - 14) * 0.075  # what a name of usual length needs is in MARGIN
    size = (width + room, height + 0.6 * room + (0.12 * len(rows) if intervals else 0))
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    values = [[float("nan") if cell is None else cell for cell in row] for row in rows]
    far = max((abs(cell) for row in rows for cell in row if cell is not None), default=0.0) or 1.0
    scale: dict[str, Any] = {"vmin": -far, "vmax": far, "cmap": "PuOr"} if difference else {"vmin": 0, "vmax": 100}
    image = axes.imshow(values, **{"cmap": "viridis", "aspect": "auto", **scale})
    for index, row in enumerate(rows):
        for column, cell in enumerate(row):
            ends = (intervals or {}).get((index, tasks[column]))
            _draw_cell(axes, image, (index, column), cell, _text(cell, difference), ends)
    axes.set_xticks(range(len(tasks)), tasks, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), [row_label(tasks, index) for index in range(len(rows))])
    axes.set_xlabel("score on")
    axes.set_ylabel("after stage")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=11)
    bar = figure.colorbar(image, ax=axes, ticks=None if difference else range(0, 101, 20), fraction=0.04, pad=0.02)
    bar.set_label("difference, points" if difference else "score, 0-100")
    bar.outline.set_visible(False)
    return figure


def _text(score: float | None, difference: bool) -> str:
    if score is None:
        return ""
    text = f"{score:+.1f}" if difference else f"{score:.1f}"
    return ("0.0" if not float(text) else text).replace("-", "\u2212")


def _draw_cell(
    axes: Any, image: Any, place: tuple[int, int], score: float | None, text: str, ends: Sequence[float] | None
) -> None:
    from matplotlib.patches import Rectangle

    row, column = place
    corner = (column - 0.5, row - 0.5)
    if score is None:
        axes.add_patch(Rectangle(corner, 1, 1, facecolor="#eeeeee", edgecolor="#bbbbbb", hatch="///", linewidth=0))
    else:
        colour = _readable_on(image.cmap(image.norm(min(max(score, image.norm.vmin), image.norm.vmax))))
        style = {"ha": "center", "va": "center", "color": colour}
        axes.text(column, row - (0.14 if ends else 0), text, **style)
        if ends:
            axes.text(column, row + 0.24, f"{ends[0]:.1f} to {ends[1]:.1f}", fontsize=6, **style)
    if row == column + 1:
        inset = 0.04
        axes.add_patch(
            Rectangle(
                (corner[0] + inset, corner[1] + inset),
                1 - 2 * inset,
                1 - 2 * inset,
                fill=False,
                edgecolor="#d62728",
                linewidth=2,
            )
        )


def _readable_on(background: Sequence[float]) -> str:
    """Pick black or white text, whichever has the higher contrast ratio (WCAG 2.1, relative luminance of sRGB)."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in background[:3]]
    luminance = sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return "black" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "white"
