"""What logged numbers are drawn against."""

from collections.abc import Iterable, Mapping
from typing import Any

STEP, STAGE, TOKENS = "progress/step", "progress/stage", "progress/tokens"
"""What curves are drawn against; they never go back within a run, however often it is started."""
AXES = (STEP, STAGE, TOKENS)


def axis_of(name: str) -> str:
    """Name the axis by which it is told how far a metric was logged."""
    return STEP if name.startswith("train/") else STAGE


def positions(entries: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Say of each metric how far along its axis it was logged.

    Args:
        entries: What was logged before; axes are numbers, values anything but None.
    """
    reached: dict[str, float] = {}
    for entry in entries:
        for name, value in entry.items():
            place = entry.get(axis_of(name))
            if value is not None and place is not None and name not in AXES:
                reached[name] = max(place, reached.get(name, place))
    return reached
