"""Differences between methods, on the same test rows and where possible the same orders and seeds."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from trace_hydra.statistics.contrasts import Contrast, Part
from trace_hydra.statistics.estimates import contrasts_of, design_of, ends_of, rows_problem
from trace_hydra.statistics.ranks import holm
from trace_hydra.statistics.scores import RunScores
from trace_hydra.statistics.variance import Share, half_width, p_value, row_noise, shares_of, weights_of


@dataclass(frozen=True)
class Difference:
    """Method `one` minus method `other` in one number."""

    one: str
    other: str
    number: str
    difference: float | None
    """Points; None where `note` says why."""
    low: float | None
    high: float | None
    """Of the 95 % interval; not corrected for many comparisons."""
    p: float | None
    """Of no difference, two-sided; below 0.05 where the interval leaves 0 out."""
    p_adjusted: float | None
    """After Holm's correction over all differences of the comparison."""
    effect: float | None
    """Paired: Cohen's d_z, mean over standard deviation of the pairs' differences. Unpaired: Cohen's d, over the pooled
    standard deviation of runs. None below 2 pairs, or 2 runs of each."""
    rows: int
    """Test rows that both answered."""
    pairs: int
    """Orders and seeds that both have; 0: compared unpaired."""
    note: str


@dataclass(frozen=True)
class Comparison:
    """All pairs of methods in one number."""

    number: str
    differences: tuple[Difference, ...]
    note: str


@dataclass(frozen=True, eq=False)
class Matched:
    """Runs of two methods, brought together."""

    value: float
    bias: tuple[float, float]
    shares: list[Share]
    """Of the difference's variance."""
    row_share: Share
    """What the test rows alone would make of it."""
    trainings: bool
    """Whether training noise is in `shares`."""
    effect: float | None
    rows: int
    pairs: int
    note: str


def compare(groups: Mapping[str, Sequence[RunScores]], number: str) -> Comparison:
    """Compare every two groups of runs in a number.

    Args:
        groups: Runs by the name of what they share, a method for example.
        number: One of `NUMBERS`, or from `score_number` or `delta_number`.
    """
    found = [_difference(*names, number, matched) for names, matched in match_all(groups, number).items()]
    tested = sum(one.p is not None for one in found)
    note = f"p adjusted by Holm over {tested} differences" if tested > 1 else ""
    return Comparison(number, corrected(found), note)


def corrected(differences: Sequence[Difference]) -> tuple[Difference, ...]:
    """Adjust p over all the differences given, of several numbers too (Holm 1979, Scand. J. Stat. 6)."""
    tested = [place for place, one in enumerate(differences) if one.p is not None]
    found = list(differences)
    for place, p in zip(tested, holm([found[place].p or 0.0 for place in tested]), strict=True):
        found[place] = replace(found[place], p_adjusted=p)
    return tuple(found)


def _difference(one: str, other: str, number: str, matched: Matched | str) -> Difference:
    if isinstance(matched, str):
        return Difference(one, other, number, None, None, None, None, None, None, 0, 0, matched)
    low, high = ends_of(matched.value, matched.bias, half_width(matched.shares))
    smallest, largest = matched.value - matched.bias[1], matched.value - matched.bias[0]
    p = p_value(max(smallest, -largest, 0.0), matched.shares)
    return Difference(
        one, other, number, matched.value, low, high, p, p, matched.effect, matched.rows, matched.pairs, matched.note
    )  # fmt: skip


def match_all(groups: Mapping[str, Sequence[RunScores]], number: str) -> dict[tuple[str, str], Matched | str]:
    """Bring every two groups of runs together, by their names; text where that cannot be done says why."""
    known: dict[RunScores, Contrast | str] = {}
    pairs = itertools.combinations(groups, 2)
    return {(one, other): _match(one, groups[one], other, groups[other], number, known) for one, other in pairs}


def _match(
    one: str,
    first: Sequence[RunScores],
    other: str,
    second: Sequence[RunScores],
    number: str,
    known: dict[RunScores, Contrast | str],
) -> Matched | str:
    """Pair two groups' runs by order and seed, or set the groups side by side."""
    if missing := [name for name, side in ((one, first), (other, second)) if not side]:
        return f"no run of {' and '.join(missing)}"
    seconds = {(run.tasks, run.seed): run for run in second}
    pairs = [(run, seconds[run.tasks, run.seed]) for run in first if (run.tasks, run.seed) in seconds]
    if len({(run.tasks, run.seed) for run in first}) < len(first) or len(seconds) < len(second):
        pairs = []  # several runs of one order and seed: none of them is the other's counterpart
    paired = len(pairs) > 1 or (bool(pairs) and min(len(first), len(second)) == 1)
    unpaired = len(first) + len(second) - 2 * len(pairs)
    if paired:
        first, second = zip(*pairs, strict=True)
    found = contrasts_of([*first, *second], number, known)
    if isinstance(found, str):
        return found
    if problem := rows_problem(found):
        return f"not compared: {problem}"
    left, right = found[: len(first)], found[len(first) :]
    rows = sum(max(len(one.parts[name].ids) for one in found if name in one.parts) for name in _names(found))
    values = [np.array([one.value for one in side]) for side in (left, right)]
    own, others = (np.mean([one.bias for one in side], axis=0) for side in (left, right))
    bias = (float(own[0] - others[1]), float(own[1] - others[0]))
    value = float(values[0].mean() - values[1].mean())
    if paired:
        differences = values[0] - values[1]
        parts = [_minus(a.parts, b.parts) for a, b in zip(left, right, strict=True)]
        noise = row_noise(parts, weights_of([len(parts)]))
        shares = shares_of([(differences, design_of(first))], noise)
        note = "one pair of runs" if len(pairs) == 1 else f"{len(pairs)} pairs of runs with the same order and seed"
        note += f"; {unpaired} without a counterpart left out" if unpaired else ""
        note += "; says nothing about other trainings" if len(pairs) == 1 else ""
        return Matched(value, bias, shares, noise.share, len(pairs) > 1, _effect(differences), rows, len(pairs), note)
    noise = row_noise([one.parts for one in found], weights_of([len(first), len(second)]))
    shares = shares_of([(values[0], design_of(first)), (values[1], design_of(second))], noise)
    note = f"unpaired: {len(first)} and {len(second)} runs, {len(pairs) or 'none'} of the same order and seed"
    if {run.tasks for run in first} != {run.tasks for run in second}:
        note += "; orders differ, which is part of the difference"
    lone = [name for name, side in ((one, first), (other, second)) if len(side) == 1]
    if lone:
        note += f"; {' and '.join(lone)} with one run, whose training noise is not covered"
    return Matched(value, bias, shares, noise.share, not lone, _pooled_effect(*values), rows, 0, note)


def _names(contrasts: Sequence[Contrast]) -> list[str]:
    return list(dict.fromkeys(name for one in contrasts for name in one.parts))


def _minus(first: Mapping[str, Part], second: Mapping[str, Part]) -> dict[str, Part]:
    """Subtract row from row."""
    found = {}
    for name in dict.fromkeys([*first, *second]):
        one, other = first.get(name), second.get(name)
        known = one or other
        if known is None:
            continue
        left, right = (part.values if part else np.zeros(len(known.ids)) for part in (one, other))
        ends = [part.ends if part else (0.0, 0.0) for part in (one, other)]
        binary = None if None in ends else (ends[0][0] - ends[1][1], ends[0][1] - ends[1][0])  # type: ignore[index]  # none of them is None
        found[name] = Part(known.ids, known.keys, left - right, binary)
    return found


def _effect(differences: np.ndarray) -> float | None:
    deviation = differences.std(ddof=1) if len(differences) > 1 else 0.0
    return float(differences.mean() / deviation) if deviation > 0 else None


def _pooled_effect(first: np.ndarray, second: np.ndarray) -> float | None:
    if min(len(first), len(second)) < 2:
        return None
    squares = sum(float(((side - side.mean()) ** 2).sum()) for side in (first, second))
    deviation = np.sqrt(squares / (len(first) + len(second) - 2))
    return float((first.mean() - second.mean()) / deviation) if deviation > 0 else None
