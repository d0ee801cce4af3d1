"""Intervals of a run's numbers: from its answers, else those that results.json holds, else why there is none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trace_hydra.collect import AREAS
from trace_hydra.report.cells import Cell, between, mapping, number, text
from trace_hydra.statistics import RunScores, delta_number, of_run, score_number


@dataclass(frozen=True)
class Bounds:
    """The ends of a 95 % interval."""

    ends: Sequence[float | None] | None
    why: str = ""
    """Why there are none."""

    def said(self, *, sign: bool = False) -> str:
        """Write them, or that there is no interval and why."""
        found = between(self.ends, sign=sign)
        return f"95 %: {found}" if found else f"no interval: {self.why or 'not in results.json'}"

    def cell(self, *, sign: bool = False) -> Cell:
        """Show them in a table."""
        found = between(self.ends, sign=sign)
        return text(found) if found else number(None, f"no interval: {self.why or 'not in results.json'}")


def bounds(results: Mapping[str, Any], scores: RunScores | str, key: str) -> Bounds:
    """Bound a number of a run over its test rows.

    Args:
        results: results.json.
        scores: Its answers, or why they cannot be read: then the interval of results.json is taken.
        key: As `statistics.of_run` takes it.
    """
    if key in results and results[key] is None:
        return Bounds(None, "there is no number")
    if len(results["tasks"]) == 1 and key.startswith("bwt"):
        return Bounds(None, "0 by definition")
    if isinstance(scores, str) or (key.startswith(delta_number("")) and not scores.sets):
        return Bounds(_stored(results, key))
    found = of_run(scores, key)
    if found.low is None or found.high is None:
        return Bounds(None, found.note.removeprefix("no interval: "))
    return Bounds((found.low, found.high))


def delta_intervals(results: Mapping[str, Any], scores: RunScores | str) -> dict[str, tuple[float, float]]:
    """Bound the change of every capability area and set over items; nothing where the answers could not be read."""
    if isinstance(scores, str):
        return {}
    found = {}
    for name in (*AREAS, *mapping(mapping(results.get("capability")).get("sets"))):
        ends = of_run(scores, delta_number(name))
        if ends.low is not None and ends.high is not None:
            found[name] = (ends.low, ends.high)
    return found


def _stored(results: Mapping[str, Any], key: str) -> Any:
    confidence, capability = mapping(results.get("confidence")), mapping(results.get("capability"))
    if key.startswith(delta_number("")):
        name = key.removeprefix(delta_number(""))
        return mapping(capability.get(name) or mapping(capability.get("sets")).get(name)).get("interval")
    if key.startswith(score_number("")):
        return mapping(mapping(confidence.get("tasks")).get(key.removeprefix(score_number("")))).get("score")
    return confidence.get(key)
