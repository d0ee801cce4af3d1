"""The smallest difference that test sets can show."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trace_hydra.statistics.compare import Matched, match_all
from trace_hydra.statistics.estimates import contrasts_of, rows_problem
from trace_hydra.statistics.scores import RunScores
from trace_hydra.statistics.variance import Share, half_width, row_noise, weights_of

POWER = 0.8


@dataclass(frozen=True)
class Smallest:
    """The smallest true difference between two methods that is found 4 times out of 5, at p < 0.05."""

    number: str
    points: float | None
    """That the test rows allow, however often one trains; None where `note` says why."""
    with_training: float | None
    """That these runs allow, with the noise of training; None where no two groups have several runs."""
    rows: int
    """Test rows that the number rests on."""
    note: str


def smallest_difference(groups: Mapping[str, Sequence[RunScores]], number: str) -> Smallest:
    """Say which difference in a number the test rows, and the runs, can show.

    With two groups or more, the noise is that of their differences; the median over pairs of groups is given. With one,
    nothing is known about how alike two methods answer; the other is supposed to score alike, on rows of its own.
    """
    groups = {name: runs for name, runs in groups.items() if runs}
    runs = [run for group in groups.values() for run in group]
    found = contrasts_of(runs, number) if runs else "no run"
    if isinstance(found, str):
        return Smallest(number, None, None, 0, found)
    rows = sum(len(part.ids) for part in found[0].parts.values())
    if problem := rows_problem(found):
        return Smallest(number, None, None, rows, problem)
    if len(groups) == 1:
        noise = row_noise([one.parts for one in found], weights_of([len(runs)]))
        variance = 2 * (float(np.diag(noise.covariance).mean()) + noise.added)
        points, trained = [_found_often([Share(variance, noise.share.freedom)])], []
        note = "supposing a second method that scores alike, but independently row by row"
    else:
        matched = [one for one in match_all(groups, number).values() if isinstance(one, Matched)]
        points = [_found_often([one.row_share]) for one in matched]
        trained = [_found_often(one.shares) for one in matched if one.trainings]
        note = f"median over {len(matched)} pairs of methods" if len(matched) > 1 else ""
    if not any(points):
        return Smallest(number, None, None, rows, "the rows show no difference to estimate the noise from")
    return Smallest(number, float(np.median(points)), float(np.median(trained)) if trained else None, rows, note)


def _found_often(shares: Sequence[Share]) -> float:
    """Add the margin of the test to that of its power (Cohen 1988, chapter 2)."""
    return half_width(shares) + half_width(shares, 2 * POWER - 1)
