"""How much a weighted sum of runs varies: test rows, which runs share, crossed with seeds and orders.

With y = mean of runs, the variance of y is (training) + (rows). Training noise is taken from the spread of runs, which
holds a part of the rows' noise too: that by which runs differ on the same rows. What rows do to all runs alike is
added (docs/statistics.md has the formulas).
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from trace_hydra.statistics.contrasts import Part

LEVEL = 0.95
_SURE = 1e9  # degrees of freedom of what is as good as known


@dataclass(frozen=True)
class Share:
    """A part of a variance."""

    variance: float
    freedom: float
    """Degrees of freedom it was estimated with."""


@dataclass(frozen=True, eq=False)
class RowNoise:
    """What test rows do to the numbers of runs."""

    covariance: np.ndarray
    """(run, run)."""
    added: float
    """To the variance of the weighted sum, where rows are too equal to show any."""
    share: Share
    """Of the weighted sum's variance."""


@dataclass(frozen=True, eq=False)
class Design:
    """Which order and seed each run has."""

    orders: Sequence[Hashable]
    seeds: Sequence[Hashable]

    def __len__(self):
        return len(self.orders)


def quantile(freedom: float, level: float = LEVEL) -> float:
    """Find t with P(|T| <= t) = `level` for Student's distribution."""
    return float(special.stdtrit(min(freedom, _SURE), (1 + level) / 2))


def half_width(shares: Sequence[Share], level: float = LEVEL) -> float:
    """Bound a sum of independent normal errors whose variances are estimated; the rows' share stands last.

    Student's interval with Satterthwaite's degrees of freedom (1946, Biometrics Bulletin 2(6)), and never narrower than
    without the rows: where training has 1 or 2 degrees of freedom, a little more variance would make them many more.
    """
    return max(_satterthwaite(shares, level), _satterthwaite(shares[:-1], level))


def _satterthwaite(shares: Sequence[Share], level: float) -> float:
    total = sum(share.variance for share in shares)
    if total <= 0:
        return 0.0
    freedom = 1 / sum((share.variance / total) ** 2 / share.freedom for share in shares)
    return float(quantile(freedom, level) * np.sqrt(total))


def p_value(distance: float, shares: Sequence[Share]) -> float:
    """Find the level at which the interval just reaches `distance`, so that p < 0.05 says the same as the interval."""
    if distance <= 0:
        return 1.0
    if half_width(shares) == 0:
        return 0.0
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if half_width(shares, 1 - middle) > distance else (low, middle)
    return high


def row_noise(runs: Sequence[Mapping[str, Part]], weights: np.ndarray) -> RowNoise:
    """Estimate how runs' numbers vary together over test rows.

    Args:
        runs: Parts by name; the rows of a part are the same in all runs that have it, see `other_rows`.
        weights: Of the runs in the sum, (run,).
    """
    total, squares, added = np.zeros((len(runs), len(runs))), 0.0, []
    for name in dict.fromkeys(name for parts in runs for name in parts):
        parts = [found.get(name) for found in runs]
        count = next(len(part.ids) for part in parts if part is not None)
        values = np.stack([np.zeros(count) if part is None else part.values for part in parts])
        centred = values - values.mean(1, keepdims=True)
        own = centred @ centred.T / (count * (count - 1))
        total += own
        variance = max(float(weights @ own @ weights), 0.0)
        more = max(_smoothed(weights @ values, parts, weights, variance) - variance, 0.0)
        added += [more] if more > 0 else []
        squares += (variance + more) ** 2 / (count - 1)
    # Of several tasks that show no variance each could have some, but all at once would be a coincidence.
    extra = sum(added) / max(len(added), 1)
    variance = max(float(weights @ total @ weights), 0.0) + extra
    return RowNoise(total, extra, Share(variance, variance**2 / squares if variance > 0 and squares > 0 else _SURE))


def _smoothed(values: np.ndarray, parts: Sequence[Part | None], weights: np.ndarray, variance: float) -> float:
    """Compute the variance of a weighted sum of 0/100 scores as if some more rows were at the ends of its range.

    Rows that are all equal have no variance, but do not prove that the next row is equal too. A score gets two rows at
    each end (Agresti and Coull 1998, The American Statistician 52(2)), beside as many as its variance is worth, which
    is more than there are where runs err on different rows (Korn and Graubard 1998, Survey Methodology 24(2)); a
    difference gets one at each end (Bonett and Price 2012, J. Educ. Behav. Stat. 37(4)).

    Returns:
        0 where scores are not of that kind.
    """
    low = high = 0.0
    for part, weight in zip(parts, weights, strict=True):
        if part is None:
            continue
        if part.ends is None:
            return 0.0
        ends = sorted(weight * end for end in part.ends)
        low, high = low + ends[0], high + ends[1]
    if low < 0 < high:
        return float(np.concatenate([values, [low, high]]).var()) / (len(values) + 2)
    spread = (values.mean() - low) * (high - values.mean())
    worth = spread / variance if variance > 0 else len(values)
    centre = (values.mean() * worth + 2 * (low + high)) / (worth + 4)
    return float((centre - low) * (high - centre)) / (worth + 4)


def other_rows(runs: Sequence[Mapping[str, Part]]) -> str:
    """Say in which test rows runs differ; "" if in none."""
    for name in dict.fromkeys(name for parts in runs for name in parts):
        parts = [found[name] for found in runs if name in found]
        first = parts[0]
        for part in parts[1:]:
            if part.ids is not first.ids and part.ids != first.ids:
                extra = sorted(set(part.ids) ^ set(first.ids))
                what = f"{len(extra)} on one side only, such as {extra[0]}" if extra else "in another sequence"
                return f"other test rows of {name}: {len(first.ids)} and {len(part.ids)}, {what}"
            if part.keys is not first.keys and part.keys != first.keys:
                odd = next(i for i, pair in enumerate(zip(part.keys, first.keys, strict=True)) if pair[0] != pair[1])
                return f"other test rows of {name}: {first.ids[odd]} has another prompt"
    return ""


def shares_of(groups: Sequence[tuple[np.ndarray, Design]], noise: RowNoise) -> list[Share]:
    """Split the variance of a group's mean, or of the difference of two groups' means; the rows' share comes last.

    Args:
        groups: One or two, each with its runs' values and their orders and seeds. Of a group of one run nothing is
            known about training, so only its rows are counted.
        noise: Of the runs of all groups, one after the other.
    """
    shares, inside, start = [], 0.0, 0
    for values, design in groups:
        stop = start + len(values)
        if len(values) > 1:
            share, form = _training(values, design)
            shares.append(share)
            inside += float((form * noise.covariance[start:stop, start:stop]).sum())
        start = stop
    weights = weights_of([len(values) for values, _ in groups])
    shared = max(float(weights @ noise.covariance @ weights) - inside, 0.0)
    return [*shares, Share(shared + noise.added, noise.share.freedom)]


def weights_of(sizes: Sequence[int]) -> np.ndarray:
    """Weigh runs so that their sum is the first group's mean minus, if there is one, the second's."""
    return np.concatenate([np.full(size, sign / size) for size, sign in zip(sizes, (1, -1), strict=False)])


def _training(values: np.ndarray, design: Design) -> tuple[Share, np.ndarray]:
    """Estimate how much the mean of runs varies with orders and seeds.

    Runs that share orders and seeds crosswise: V(orders) + V(seeds) - V(what neither explains), the last two only if
    their difference is positive. Seeds of their own in each order, or one order, or one seed: that of the outer factor.

    Returns:
        The share, and the quadratic form in `values` that gave it, (run, run): it tells how much of the rows' noise is
        in it.
    """
    orders, seeds = _same(design.orders), _same(design.seeds)
    if (seeds <= orders).all() or (orders <= seeds).all():
        outer, inner = (orders, seeds) if (seeds <= orders).all() else (seeds, orders)
        blocks = next((one for one in (outer, inner) if not one.all()), np.eye(len(values)))
        form, freedom = _form(blocks)
        return Share(max(float(values @ form @ values), 0.0), freedom), form
    forms = [_form(orders), _form(seeds), _rest(orders, seeds)]
    order, seed, rest = (max(float(values @ form @ values), 0.0) for form, _ in forms)
    (form, freedom), (seed_form, seed_freedom), (rest_form, rest_freedom) = forms
    if seed <= rest:
        return Share(order, freedom), form
    total = order + seed - rest
    squares = order**2 / freedom + seed**2 / seed_freedom + rest**2 / rest_freedom
    return Share(total, max(total**2 / squares, min(freedom, seed_freedom))), form + seed_form - rest_form


def _rest(orders: np.ndarray, seeds: np.ndarray) -> tuple[np.ndarray, float]:
    """Build the form of what neither order nor seed explain; 0 if nothing is left."""
    factors = np.concatenate([orders, seeds], axis=1)
    left = np.eye(len(orders)) - factors @ np.linalg.pinv(factors)
    freedom = round(float(np.trace(left)))
    return (left / freedom / len(orders), freedom) if freedom else (np.zeros_like(left), _SURE)


def _same(levels: Sequence[Hashable]) -> np.ndarray:
    """Mark runs with the same level, (run, run)."""
    numbers = {level: number for number, level in enumerate(dict.fromkeys(levels))}
    own = np.array([numbers[level] for level in levels])
    return (own[:, None] == own).astype(np.float64)


def _form(same: np.ndarray) -> tuple[np.ndarray, float]:
    """Build the quadratic form whose expectation is a factor's share in the variance of the mean.

    It is unbiased where that factor alone acts, for any number of runs at each level; with as many at each it is the
    variance of the levels' means over their number. Degrees of freedom as in Bell and McCaffrey 2002 (Survey
    Methodology 28(2)): trace(QK)^2 / trace(QKQK).

    Args:
        same: Which runs have the same level, (run, run); two levels or more.
    """
    count = len(same)
    centre = np.eye(count) - 1 / count
    form = centre @ same @ centre / count**2
    form *= same.mean() / np.trace(form @ same)
    product = form @ same
    return form, float(np.trace(product) ** 2 / np.trace(product @ product))
