"""How much the largest of several measured means exceeds the largest of the true ones."""

import functools

import numpy as np

_DRAWS = 1000


def bias_of_max(rows: np.ndarray) -> tuple[float, float]:
    """Bound E[max of means] - max of true means, which is never negative.

    Whoever picks the best of several noisy scores picks luck along with it. How much depends on the true gaps, which
    are not known: the smaller bound takes those measured for true; the larger one takes all candidates for equal that
    lie within sqrt(ln n) standard errors of the best, and leaves the others out (the selection of Andrews and Soares
    2010, Econometrica 78(1), 119-157).

    Args:
        rows: Values of the candidates' test rows, (candidate, row).

    Returns:
        Smaller and larger bound, in the unit of `rows`; (0, 0) for a single candidate.
    """
    count, num_rows = rows.shape
    if count == 1 or num_rows < 2:
        return 0.0, 0.0
    means = rows.mean(1)
    centred = rows - means[:, None]
    covariance = centred @ centred.T / (num_rows * (num_rows - 1))
    variances, vectors = np.linalg.eigh(covariance)
    noise = _normals(count) @ (vectors * np.sqrt(np.maximum(variances, 0.0))).T  # (draw, candidate)
    best = int(means.argmax())
    noise -= noise[:, [best]]  # of mean 0: the same expectation with less spread
    measured = (noise + means).max(1).mean() - means[best]
    gaps = means[best] - means
    spread = np.sqrt(np.maximum(np.diag(covariance) + covariance[best, best] - 2 * covariance[best], 0.0))
    close = gaps <= np.sqrt(np.log(num_rows)) * spread
    return float(measured), max(float(noise[:, close].max(1).mean()), float(measured))


@functools.cache
def _normals(count: int) -> np.ndarray:
    """Draw the same numbers in every call, in pairs of opposite sign."""
    half = np.random.default_rng(count).standard_normal((_DRAWS // 2, count))
    return np.concatenate([half, -half])
