"""Numbers of a run as weighted sums over its test rows.

Every number here is, near what was measured, a weighted sum of cells (`forgetting`: with each task's best row held
where it is; `bwt_clipped`: with the sign of each change). Each test row then moves the number by a share of its own,
its influence, and the sum of squared influences is the variance that a paired bootstrap over test rows tends to with
ever more replicates (Efron 1982, The Jackknife, the Bootstrap and Other Resampling Plans, chapter 6).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from trace_hydra.metrics.continual import FORMULAS, as_array, evaluate, missing_cells
from trace_hydra.statistics.peaks import bias_of_max
from trace_hydra.statistics.scores import RunScores

NUMBERS = FORMULAS
AREAS = ("general", "instruction", "safety")
_SCORE, _DELTA = "score:", "delta_"


@dataclass(frozen=True, eq=False)
class Part:
    """A task's or a capability set's share in a number."""

    ids: tuple[str, ...]
    keys: tuple[str, ...]
    """Beside the ids: what else must be equal for the rows to be the same (hashes of prompts)."""
    values: np.ndarray
    """(row,); the part's share in the number is their mean."""
    ends: tuple[float, float] | None
    """Smallest and largest value that a row of a 0/100 score can have; None for other scores."""


@dataclass(frozen=True, eq=False)
class Contrast:
    """A number of one run, and what each of its test rows adds to it."""

    value: float
    parts: Mapping[str, Part]
    range: tuple[float, float]
    """Values that the number can have."""
    bias: tuple[float, float] = (0.0, 0.0)
    """Bounds of how much too high the number is on average; not 0 where it holds a maximum."""


def score_number(task: str) -> str:
    """Name the number "last score of a task"."""
    return _SCORE + task


def delta_number(name: str) -> str:
    """Name the number "delta of a capability area, or of a set"."""
    return _DELTA + name


def contrast(run: RunScores, number: str) -> Contrast | str:
    """Express a number of a run by its rows, or say why the run does not have it."""
    if number.startswith(_DELTA):
        return _delta(run, number.removeprefix(_DELTA))
    if number.startswith(_SCORE):
        return _score(run, number.removeprefix(_SCORE))
    if number not in NUMBERS:
        return f"{number!r} is none of {', '.join(NUMBERS)}, {_SCORE}TASK, {_DELTA}AREA, {_DELTA}SET"
    if lacking := missing_cells(run.matrix, number):
        return f"{run.name} lacks {', '.join(lacking)}"
    scores = as_array(run.matrix.rows)
    value = float(evaluate(scores, [number])[number])
    weights = _weights(scores, number)
    parts = {}
    for column, task in enumerate(run.tasks):
        rows = {int(row): float(weights[row, column]) for row in weights[:, column].nonzero()[0]}
        if rows:
            parts[task] = _part(run, task, rows)
    limits = {"op": (0.0, 100.0), "bwt_clipped": (-100.0, 0.0)}.get(number, (-100.0, 100.0))
    return Contrast(value, parts, limits, _bias(run, number))


def _weights(scores: np.ndarray, number: str) -> np.ndarray:
    """Derive a formula after its cells, (T + 1, T)."""
    count = scores.shape[1]
    weights = np.zeros_like(scores)
    earlier = np.arange(count - 1)
    if number == "op":
        weights[-1] = 1 / count
    elif number == "fwt":
        weights[earlier + 1, earlier + 1] = 1 / (count - 1)
        weights[0, 1:] -= 1 / (count - 1)
    elif number == "forgetting":
        before = scores[1:-1, :-1]
        best = np.where(np.isnan(before), -np.inf, before).argmax(0) + 1
        weights[best, earlier] = 1 / (count - 1)
        weights[-1, :-1] -= 1 / (count - 1)
    else:
        terms = count - 1 if number == "bwt" else count
        counted = np.ones(count - 1)
        if number == "bwt_clipped":
            counted = (scores[-1, :-1] < scores[earlier + 1, earlier]).astype(np.float64)
        weights[-1, :-1] = counted / terms
        weights[earlier + 1, earlier] -= counted / terms
    return weights


def _part(run: RunScores, task: str, weights: Mapping[int, float]) -> Part:
    cells = {row: run.cells[row, task] for row in weights}
    first = next(iter(cells.values()))
    values = sum((weight * cells[row].values for row, weight in weights.items()), np.zeros(len(first.ids)))
    ends = None
    if all(cell.zero_or_all for cell in cells.values()):
        down, up = (sum(sign * max(sign * one, 0.0) for one in weights.values()) for sign in (-1, 1))
        ends = (100 * down, 100 * up)
    return Part(first.ids, first.prompts, values, ends)


def _bias(run: RunScores, number: str) -> tuple[float, float]:
    """Bound how much too high the maxima of a formula make it; that of `bwt_clipped` is -max(-change, 0)."""
    if number not in ("forgetting", "bwt_clipped"):
        return 0.0, 0.0
    count = len(run.tasks)
    bounds = []
    for column, task in enumerate(run.tasks[:-1], start=1):
        last = run.cells[count, task].values
        if number == "forgetting":
            rows = [run.cells[row, task].values - last for row in range(1, count) if (row, task) in run.cells]
        else:
            rows = [run.cells[column, task].values - last, np.zeros_like(last)]
        bounds.append(bias_of_max(np.stack(rows)))
    low, high = (sum(ends) for ends in zip(*bounds, strict=True))
    return (low / (count - 1), high / (count - 1)) if number == "forgetting" else (-high / count, -low / count)


def _score(run: RunScores, task: str) -> Contrast | str:
    last = len(run.tasks)
    if (last, task) not in run.cells:
        return f"{run.name} has no score of {task} after its last stage"
    return Contrast(run.cells[last, task].mean, {task: _part(run, task, {last: 1.0})}, (0.0, 100.0))


def _delta(run: RunScores, name: str) -> Contrast | str:
    """An area's delta averages the sets of one measure: those that a judge compared, if there are any (deltas.py)."""
    own = {key: found for key, found in run.sets.items() if name == (found.area if name in AREAS else key)}
    if name in AREAS and any(found.judged for found in own.values()):
        own = {key: found for key, found in own.items() if found.judged}
    if not own:
        return f"{run.name} has no delta of {name}"
    parts, means = {}, []
    for key, found in own.items():
        mean = float(found.weights @ found.values)
        means.append(mean)
        even = bool(np.allclose(found.weights, 1 / len(found.ids)))
        values = found.values if even else mean + len(found.ids) * found.weights * (found.values - mean)
        binary = even and bool(np.isin(found.values, (-100.0, 0.0, 100.0)).all())
        ends = (-100 / len(own), 100 / len(own)) if binary else None
        parts[key] = Part(found.ids, (), values / len(own), ends)
    return Contrast(float(np.mean(means)), parts, (-100.0, 100.0))
