"""What is left of the start model's abilities: printed, and in every logger, after each measured stage."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from trace_hydra.callbacks.base import RunCallback
from trace_hydra.callbacks.log import is_rank_zero, log_metrics, log_summary, log_table
from trace_hydra.plan import RunInfo
from trace_hydra.terminal import mode_of

AREAS = {
    "general": ("general ability", "delta_general"),
    "instruction": ("instruction following", "delta_if"),
    "safety": ("safety", "delta_safety"),
}
"""Area -> how it is printed, and its name in loggers."""
_COLUMNS = ("set", "category", "id", "prompt", "output_before", "output_after", "before", "after", "delta")
_JUDGED = ("set", "category", "id", "prompt", "output_before", "output_after", "outcome", "verdicts", "explanations")


class CapabilityDelta(RunCallback):
    """Shows and logs the deltas of general ability, instruction following and safety.

    Logged for each measured stage, against `progress/stage`: `capability/<set>` (score of the trained model),
    `capability/<set>/delta` and `capability/delta_general`, `_if`, `_safety` with their intervals, so that the charts
    run over stages; to W&B also a table of the worst drops and one of the judged pairs. At the end the last measured
    stage's `delta_general`, `delta_if`, `delta_safety`, each with `_ci_low` and `_ci_high`.

    Args:
        show: Print to stdout.
        worst: Rows of the table of worst drops.
        judged: Rows of the table of judged pairs.
        characters: Of a text that a table shows.
        mode: As `progress`; quiet prints nothing.
    """

    def __init__(self, *, show: bool, worst: int, judged: int, characters: int, mode: str = "auto"):
        self.show, self.worst, self.judged, self.characters = show, worst, judged, characters
        self.mode = mode

    def on_run_start(self, run: RunInfo, loggers: list) -> None:
        """Take the loggers."""
        self._loggers = loggers
        self._last: tuple[int, Mapping[str, Any]] | None = None

    def on_capability(self, row: int, deltas: Mapping[str, Any], pairs: Sequence[Mapping[str, Any]]) -> None:
        """Log a measured stage."""
        self._last = (row, deltas)
        metrics: dict[str, float | None] = {}
        for name, found in deltas["sets"].items():
            metrics |= {f"capability/{name}": found["after"], f"capability/{name}/delta": found["delta"]}
            metrics |= {f"capability/{name}/{share}": found.get(share) for share in ("win", "tie", "lose")}
        metrics |= {f"capability/{name}": value for name, value in _headline(deltas).items()}
        log_metrics(self._loggers, {**metrics, "progress/stage": row}, row)
        drops = sorted((pair for pair in pairs if (pair["delta"] or 0) < 0), key=lambda pair: pair["delta"])
        self._table("capability/worst_drops", _COLUMNS, drops[: self.worst], row)
        judged = [pair for pair in pairs if "outcome" in pair]
        self._table("capability/judged", _JUDGED, judged[: self.judged], row)
        if self.show and is_rank_zero() and mode_of(self.mode, sys.stderr) != "quiet":
            print(f"\ncapability after stage {row}, change in points, 95 % interval")
            print("\n".join(lines(deltas)))

    def on_run_end(self, results: Mapping[str, Any]) -> None:
        """Log the last measured stage as the run's."""
        if self._last is not None:
            row, deltas = self._last
            log_summary(self._loggers, _headline(deltas), row)

    def _table(self, name: str, columns: Sequence[str], pairs: Sequence[Mapping[str, Any]], row: int) -> None:
        if pairs:
            data = [[self._shown(pair.get(column)) for column in columns] for pair in pairs]
            log_table(self._loggers, name, columns, data, row)

    def _shown(self, value: Any) -> Any:
        return value if value is None or isinstance(value, int | float) else str(value)[: self.characters]


def _headline(deltas: Mapping[str, Any]) -> dict[str, float | None]:
    metrics: dict[str, float | None] = {}
    for area, (_, name) in AREAS.items():
        if found := deltas.get(area):
            low, high = found["interval"]
            metrics |= {name: found["delta"], f"{name}_ci_low": low, f"{name}_ci_high": high}
    return metrics


def lines(deltas: Mapping[str, Any]) -> list[str]:
    """Write the deltas of a row: a line an area, and one for each of its sets."""
    text = []
    for area, (title, _) in AREAS.items():
        if found := deltas.get(area):
            how = "judged" if found["measure"] == "judge" else "scored"
            verdict = "differs from 0" if found["differs"] else "not told from 0"
            text.append(f"{title:<24}{_change(found)}  {verdict} ({how}, {found['n']} items)")
        for name, one in deltas["sets"].items():
            if one["area"] == area:
                text.append(f"  {name:<22}{_change(one)}{_scores(one)}")
    return text


def _change(found: Mapping[str, Any]) -> str:
    if found["delta"] is None:
        return f"{'no verdict':>24}"  # only what a judge compares can be without a delta
    low, high = found["interval"]
    return f"{found['delta']:+7.1f} [{low:+.1f}, {high:+.1f}]".ljust(25)


def _scores(found: Mapping[str, Any]) -> str:
    if found["before"] is not None:
        return f"  {found['before']:.1f} -> {found['after']:.1f}"
    if found.get("win") is not None:
        return f"  win {found['win']:.0f} tie {found['tie']:.0f} lose {found['lose']:.0f} %"
    return ""
