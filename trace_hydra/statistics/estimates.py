"""Numbers with the interval that holds the true value 19 times out of 20 (docs/statistics.md)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trace_hydra.statistics.contrasts import Contrast, Part, contrast, delta_number
from trace_hydra.statistics.scores import RunScores
from trace_hydra.statistics.variance import Design, half_width, other_rows, quantile, row_noise, shares_of, weights_of

_EMPTY = "no interval: "


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval."""

    value: float | None
    """Points; None where `note` says why."""
    low: float | None
    high: float | None
    """None where `note` says why."""
    note: str
    """What the interval covers and what it does not, or why there is none."""


def of_run(scores: RunScores, number: str) -> Estimate:
    """Bound a number of one run; the interval covers other test rows of the same kind, not other trainings.

    Args:
        scores: Of the run.
        number: One of `NUMBERS`, or from `score_number` or `delta_number`.
    """
    return across_runs([scores], number)


def across_runs(runs: Sequence[RunScores], number: str) -> Estimate:
    """Bound the mean of a number over runs that differ in nothing but seed and order.

    The interval covers other test rows, and other seeds and orders as far as the runs have several of them.
    """
    if not runs:
        return Estimate(None, None, None, "no run")
    contrasts = contrasts_of(runs, number)
    if isinstance(contrasts, str):
        return Estimate(None, None, None, contrasts)
    values = np.array([one.value for one in contrasts])
    value = float(values.mean()) if len(runs) > 1 else contrasts[0].value
    if problem := rows_problem(contrasts):
        return Estimate(value, None, None, _EMPTY + problem)
    design = design_of(runs)
    parts = [one.parts for one in contrasts]
    if len(runs) == 1 and (part := _share_of_rows(parts[0])):
        return Estimate(value, *_wilson(value, len(part.ids)), covered(design))
    width = half_width(shares_of([(values, design)], row_noise(parts, weights_of([len(runs)]))))
    low, high = ends_of(value, np.mean([one.bias for one in contrasts], axis=0), width)
    limits = contrasts[0].range
    return Estimate(value, max(low, limits[0]), min(high, limits[1]), covered(design))


def contrasts_of(
    runs: Sequence[RunScores], number: str, known: dict[RunScores, Contrast | str] | None = None
) -> list[Contrast] | str:
    """Express the number of each run by its rows, or say which runs do not have it.

    Args:
        runs: In the order of the result.
        number: As in `of_run`.
        known: Of the same number, by run: looked up and added to.
    """
    known = {} if known is None else known
    for run in runs:
        if run not in known:
            known[run] = contrast(run, number)
    found = [known[run] for run in runs]
    lacking = [one for one in found if isinstance(one, str)]
    if lacking:
        return "; ".join(dict.fromkeys(lacking))
    if len({frozenset(run.tasks) for run in runs}) > 1:
        return "the runs have other tasks, so their numbers are not of one kind"
    contrasts = [one for one in found if isinstance(one, Contrast)]
    if number.startswith(delta_number("")) and len({frozenset(one.parts) for one in contrasts}) > 1:
        return "the runs have other capability sets, so their deltas are not of one kind"
    return contrasts


def rows_problem(contrasts: Sequence[Contrast]) -> str:
    """Say why no interval can be had from test rows; "" if it can."""
    if short := sorted({name for one in contrasts for name, part in one.parts.items() if len(part.ids) < 2}):
        return f"a single test row of {', '.join(short)}"
    return other_rows([one.parts for one in contrasts])


def design_of(runs: Sequence[RunScores]) -> Design:
    """Say which order and seed each run has; orders are told by their tasks, not by name."""
    return Design([run.tasks for run in runs], [run.seed for run in runs])


def ends_of(value: float, bias: Sequence[float], width: float) -> tuple[float, float]:
    """Lay an interval around a value, and hold it, that is on average too high by something between two bounds."""
    smallest, largest = bias
    return float(min(value - largest - width, value)), float(max(value - smallest + width, value))


def covered(design: Design) -> str:
    """Say what an interval covers, and what it does not."""
    seeds, orders = len(set(design.seeds)), len(set(design.orders))
    if len(design) == 1:
        return "95 % over test rows; one run, so what varies between trainings is not covered"
    parts = ["test rows", *([f"{seeds} seeds"] if seeds > 1 else []), *([f"{orders} orders"] if orders > 1 else [])]
    if len(parts) == 1:
        parts.append(f"{len(design)} runs of one seed and order")
    text = f"95 % over {', '.join(parts)}"
    if orders == 1:
        text += "; one order, so other orders are not covered"
    if orders == 2:
        text += "; wide, as two orders say little about others"
    return text


def _share_of_rows(parts: Mapping[str, Part]) -> Part | None:
    """Return the only part of a number that is a share of right rows."""
    part = next(iter(parts.values()), None)
    return part if len(parts) == 1 and part is not None and part.ends == (0.0, 100.0) else None


def _wilson(value: float, count: int) -> tuple[float, float]:
    """Bound a share of right rows, in points (Wilson 1927, J. Am. Stat. Assoc. 22(158)); fits 0 % and 100 % too."""
    z = quantile(float("inf"))
    share = value / 100
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    width = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return min(max(100 * (centre - width), 0.0), value), max(min(100 * (centre + width), 100.0), value)
