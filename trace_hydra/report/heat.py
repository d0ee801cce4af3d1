"""The score matrix as coloured cells of a table, and the difference of two."""

from collections.abc import Sequence
from dataclasses import dataclass

from trace_hydra.callbacks.table import row_label
from trace_hydra.report.cells import Cell, number

Matrix = Sequence[Sequence[float | None]]


@dataclass(frozen=True)
class HeatCell:
    """A cell of a heat map."""

    cell: Cell
    own: bool
    """Whether the row is the task's own stage."""
    background: str = ""
    ink: str = ""
    """`#rrggbb`, or nothing where there is no number."""


@dataclass(frozen=True)
class HeatRow:
    """A row of a heat map."""

    label: str
    cells: list[HeatCell]


def heat_rows(tasks: Sequence[str], matrix: Matrix, why: str, *, digits: int = 2) -> list[HeatRow]:
    """Colour scores from 0 to 100; `why` is said of cells that have none."""
    return [
        HeatRow(
            row_name(tasks, index),
            [
                HeatCell(
                    number(value, why, digits=digits),
                    index == column + 1,
                    *(heat(value) if value is not None else ()),
                )
                for column, value in enumerate(row)
            ],
        )
        for index, row in enumerate(matrix)
    ]


def change_rows(tasks: Sequence[str], one: Matrix, other: Matrix) -> list[HeatRow]:
    """Colour the scores of `one` minus those of `other`: orange for less, blue for more."""
    changes = [
        [None if a is None or b is None else a - b for a, b in zip(*rows, strict=True)]
        for rows in zip(one, other, strict=True)
    ]
    largest = max((abs(value) for row in changes for value in row if value is not None), default=0.0)
    return [
        HeatRow(
            row_name(tasks, index),
            [
                HeatCell(
                    number(value, "not scored in both", digits=1, sign=True),
                    index == column + 1,
                    *(heat_change(value, largest) if value is not None else ()),
                )
                for column, value in enumerate(row)
            ],
        )
        for index, row in enumerate(changes)
    ]


def row_name(tasks: Sequence[str], row: int) -> str:
    """Name a stage, also one that the tasks do not have, as curves of another start of the run may."""
    return row_label(tasks, row) if 0 <= row <= len(tasks) else f"{row} (not among the tasks)"


def heat(value: float) -> tuple[str, str]:
    """Give the colours of a score from 0 to 100: background and the text that is readable on it, `#rrggbb`."""
    background = _between(_VIRIDIS, min(max(value, 0.0), 100.0) / 100)
    return _hex(background), readable_on(background)


def heat_change(value: float, largest: float) -> tuple[str, str]:
    """Give the colours of a change: orange for a loss, blue for a gain, white for none; `largest` has full colour."""
    share = min(abs(value) / largest, 1.0) if largest else 0.0
    background = _between(_LOSS if value < 0 else _GAIN, share)
    return _hex(background), readable_on(background)


def readable_on(background: Sequence[float]) -> str:
    """Pick black or white, whichever has the higher contrast (WCAG 2.1), on a colour with parts from 0 to 1."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in background]
    luminance = sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return "#000000" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "#ffffff"


# Stops of matplotlib's viridis and, for changes, of Okabe and Ito's vermilion and blue.
_VIRIDIS = (
    *("#440154", "#482878", "#3e4989", "#31688e", "#26828e"),
    *("#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"),
)
_LOSS = ("#ffffff", "#f3c9a8", "#d55e00")
_GAIN = ("#ffffff", "#b3d3e8", "#0072b2")


def _between(stops: Sequence[str], share: float) -> tuple[float, float, float]:
    place = share * (len(stops) - 1)
    left = min(int(place), len(stops) - 2)
    ends = [[int(stop[i : i + 2], 16) / 255 for i in (1, 3, 5)] for stop in stops[left : left + 2]]
    red, green, blue = (low + (high - low) * (place - left) for low, high in zip(*ends, strict=True))
    return red, green, blue


def _hex(colour: Sequence[float]) -> str:
    return "#" + "".join(f"{round(part * 255):02x}" for part in colour)
