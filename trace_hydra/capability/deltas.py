"""Deltas against the start model: dR_t, the mean over sets of R_{t,i} - R_{0,i} (arXiv:2310.06762, section 5.1)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trace_hydra.capability.base import AREAS, Pair
from trace_hydra.errors import DataError

_BLOCK = 256  # replicates at a time, so that memory does not grow with `samples`


def compare_sets(pairs: Sequence[Pair], *, macro: Mapping[str, bool], samples: int, seed: int) -> dict[str, Any]:
    """Sum up the pairs of one measured stage.

    A set's delta is the mean over its items, or with `macro` the mean over its categories' means. Its interval is a
    paired bootstrap (Efron and Tibshirani 1993, chapter 13; 95 %, percentile): items are drawn with replacement from
    the whole set, an item's before and after go together, and with `macro` an item weighs as much as in the mean of
    means. Not within categories: of one item a category that would draw the same items always, and of few it says
    too narrow an interval; what categories differ in is then part of the interval.

    An area's delta is the unweighted mean over its sets, whose draws are independent. Sets of different measures are
    not averaged: an area reports those that a judge compared, if there are any, else those that were scored, and says
    which (`measure`).

    Args:
        pairs: Of all sets; those without a delta are counted (`unscored`) and left out.
        macro: Set name -> whether its categories weigh alike.
        samples: Replicates, at least 1.
        seed: Not negative; with the set's name it decides the draws.

    Returns:
        Area -> {delta, interval, differs, measure, sets, n}, `sets` the names averaged; and under "sets" by name {area,
        measure, n, unscored, before, after, delta, interval, differs, categories}. Numbers are points on the 0-100
        scale, None where nothing was scored; `differs` says whether the interval leaves 0 out.
    """
    if samples < 1 or seed < 0:
        raise DataError(f"capability deltas need samples >= 1 and seed >= 0; got {samples}, {seed}.")
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(pair["set"], []).append(pair)
    sets, draws = {}, {}
    for name, own in groups.items():
        sets[name], draws[name] = _compare_set(name, own, macro.get(name, False), samples, seed)
    areas = {area: _area(area, sets, draws) for area in AREAS}
    return {**{area: found for area, found in areas.items() if found}, "sets": sets}


def _compare_set(
    name: str, pairs: Sequence[Pair], macro: bool, samples: int, seed: int
) -> tuple[dict[str, Any], np.ndarray | None]:
    """Sum up one set; also its replicated deltas, (samples,), None if nothing was scored."""
    scored = [pair for pair in pairs if pair["delta"] is not None]
    found: dict[str, Any] = {
        "area": pairs[0]["area"],
        "measure": pairs[0]["measure"],
        "n": len(scored),
        "unscored": len(pairs) - len(scored),
        "macro": macro,
        "before": None,
        "after": None,
        "delta": None,
        "interval": None,
        "differs": None,
        "categories": {},
    }
    if not scored:
        return found, None
    categories: dict[str, list[Pair]] = {}
    for pair in scored:
        categories.setdefault(pair["category"], []).append(pair)
    found["categories"] = {
        category: {"n": len(own), **{key: _mean(own, key) for key in ("before", "after", "delta")}}
        for category, own in categories.items()
    }
    parts = list(categories.values()) if macro else [scored]
    for key in ("before", "after", "delta"):
        means = [_mean(part, key) for part in parts]
        found[key] = None if None in means else float(np.mean(means))  # type: ignore[arg-type]
    rng = np.random.default_rng([seed, *name.encode()])
    deltas = np.array([pair["delta"] for part in parts for pair in part], dtype=np.float64)
    weights = np.array([1 / len(part) for part in parts for _ in part])
    draws = _resampled(deltas, weights, samples, rng)
    return {**found, **_interval(draws)}, draws


def _area(area: str, sets: Mapping[str, Any], draws: Mapping[str, np.ndarray | None]) -> dict[str, Any] | None:
    own = [name for name, found in sets.items() if found["area"] == area and found["delta"] is not None]
    judged = [name for name in own if sets[name]["before"] is None]
    chosen = judged or own
    if not chosen:
        return None
    return {
        "delta": float(np.mean([sets[name]["delta"] for name in chosen])),
        **_interval(np.mean([draws[name] for name in chosen], axis=0)),  # type: ignore[misc]
        "measure": "judge" if judged else "score",
        "sets": chosen,
        "n": sum(sets[name]["n"] for name in chosen),
    }


def _resampled(values: np.ndarray, weights: np.ndarray, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Average resampled values by their weights: (samples,)."""
    means = []
    for start in range(0, samples, _BLOCK):
        drawn = rng.integers(len(values), size=(min(_BLOCK, samples - start), len(values)))  # (replicate, item)
        means.append((values * weights)[drawn].sum(1) / weights[drawn].sum(1))
    return np.concatenate(means)


def _interval(draws: np.ndarray) -> dict[str, Any]:
    low, high = (float(end) for end in np.quantile(draws, [0.025, 0.975]))
    return {"interval": [low, high], "differs": low > 0 or high < 0}


def _mean(pairs: Sequence[Pair], key: str) -> float | None:
    values = [pair[key] for pair in pairs]
    return None if None in values else float(np.mean(values))
