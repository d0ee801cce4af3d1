"""Methods ranked over tasks (Demšar 2006, JMLR 7, 1-30: Friedman's test, Nemenyi's critical difference, Wilcoxon)."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from trace_hydra.statistics.scores import RunScores


@dataclass(frozen=True)
class CriticalDifference:
    """What a critical-difference diagram shows."""

    ranks: Mapping[str, float]
    """Mean rank by method, best (1) first; empty where `note` says why there is no diagram."""
    blocks: int
    """Tasks that the methods were ranked on."""
    p: float | None
    """Of Friedman's test that no method differs."""
    distance: float | None
    """Nemenyi's critical difference of mean ranks at 5 %."""
    cliques: tuple[tuple[str, ...], ...]
    """Methods whose mean ranks lie within `distance`, two or more, largest sets only."""
    note: str
    wilcoxon: Mapping[tuple[str, str], float] = field(default_factory=dict)
    """p of the signed-rank test by pair of methods, Holm-corrected; does not depend on what else is ranked."""


def critical_difference(groups: Mapping[str, Sequence[RunScores]]) -> CriticalDifference:
    """Rank methods by their last score of each task.

    A task's score is averaged over the orders and seeds that all methods have, and counts once: scores of one task
    under several seeds share their test rows and are no independent blocks (Demšar 2006, section 3.1.3).
    """
    problem, scores, runs = _scores(groups)
    if problem:
        return CriticalDifference({}, 0, None, None, (), problem)
    from scipy import stats  # a third of a second, which a run without a sweep need not wait for

    names = list(groups)
    blocks, count = scores.shape  # (task, method)
    means = stats.rankdata(-scores, axis=1).mean(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        p = float(stats.friedmanchisquare(*scores.T).pvalue)
    quantile = float(stats.studentized_range.ppf(0.95, count, np.inf)) / np.sqrt(2)
    distance = float(quantile * np.sqrt(count * (count + 1) / (6 * blocks)))
    ranks = dict(sorted(zip(names, map(float, means), strict=True), key=lambda one: one[1]))
    note = f"last scores on {blocks} tasks, each the mean over {runs} orders and seeds"
    if blocks < 10 or count < 5:  # Demšar 2006, section 3.2.2
        note += "; so few that Friedman's p is approximate"
    return CriticalDifference(
        ranks, blocks, 1.0 if np.isnan(p) else p, distance, _cliques(ranks, distance), note, _pairwise(names, scores)
    )  # fmt: skip


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p for the number of tests (Holm 1979, Scand. J. Stat. 6, 65-70)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        largest = max(largest, min(p_values[place] * (len(p_values) - rank), 1.0))
        adjusted[place] = largest
    return adjusted


def _scores(groups: Mapping[str, Sequence[RunScores]]) -> tuple[str, np.ndarray, int]:
    """Average each method's last scores over shared runs, (task, method); or say what is in the way."""
    nothing = np.empty((0, 0))
    if len(groups) < 3:
        return f"a critical difference needs 3 methods, not {len(groups)}", nothing, 0
    by_place: list[dict[tuple[tuple[str, ...], int], list[RunScores]]] = [{} for _ in groups]
    for own, runs in zip(by_place, groups.values(), strict=True):
        for run in runs:
            own.setdefault((run.tasks, run.seed), []).append(run)
    places = [place for place in by_place[0] if all(place in own for own in by_place)]
    if not places:
        return "no order and seed is there for all methods", nothing, 0
    tasks = sorted(set(places[0][0]))
    if any(sorted(order) != tasks for order, _ in places):
        return "the runs have other tasks", nothing, 0
    if len(tasks) < 2:
        return f"a critical difference needs 2 tasks, not {len(tasks)}", nothing, 0
    scores = np.empty((len(tasks), len(groups)))
    for column, own in enumerate(by_place):
        for row, task in enumerate(tasks):
            cells = [run.cells.get((len(tasks), task)) for place in places for run in own[place]]
            if None in cells:
                return f"{list(groups)[column]} lacks a last score of {task}", nothing, 0
            scores[row, column] = np.mean([cell.mean for cell in cells if cell is not None])
    return "", scores, len(places)


def _cliques(ranks: Mapping[str, float], distance: float) -> tuple[tuple[str, ...], ...]:
    names, values = list(ranks), list(ranks.values())
    found, reached = [], 0
    for start in range(len(names)):
        stop = max(end for end in range(start + 1, len(names) + 1) if values[end - 1] - values[start] <= distance)
        if stop > reached and stop - start > 1:
            found.append(tuple(names[start:stop]))
        reached = max(reached, stop)
    return tuple(found)


def _pairwise(names: Sequence[str], scores: np.ndarray) -> dict[tuple[str, str], float]:
    from scipy import stats

    pairs = list(itertools.combinations(range(len(names)), 2))
    found = []
    for one, other in pairs:
        differences = scores[:, one] - scores[:, other]
        found.append(float(stats.wilcoxon(differences)[1]) if differences.any() else 1.0)  # type: ignore[index]  # SciPy says no types
    return {(names[one], names[other]): p for (one, other), p in zip(pairs, holm(found), strict=True)}
