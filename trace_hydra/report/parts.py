"""Tables and numbers of report.md."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def tag(results: Mapping[str, Any]) -> str:
    """Name the protocol of a run with its fingerprint."""
    protocol = results["protocol"]
    return f"{protocol['name']} [{protocol['fingerprint']}]"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, texts: Sequence[str] = ()) -> str:
    """Write a table; columns of numbers are aligned right, the first and those named in `texts` left."""
    rules = ["---" if name in texts or not index else "---:" for index, name in enumerate(head)]
    lines = [head, rules, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None) -> str:
    """Write a score."""
    return "–" if value is None else f"{value:.2f}"


def interval(ends: Sequence[float] | None) -> str:
    """Write an interval."""
    return f"{ends[0]:.2f} to {ends[1]:.2f}" if ends and ends[0] is not None else "–"
