"""Means over runs, with Student's t interval."""

import math
from collections.abc import Sequence


def mean_and_margin(values: Sequence[float], level: float = 0.95) -> tuple[float | None, float | None]:
    """Average runs and bound their mean.

    Args:
        values: One a run, taken as independent draws.
        level: Of the interval, in (0, 1).

    Returns:
        Mean, and half the width of its interval t * s / sqrt(n); None for no value, None for the half width of one.
    """
    count = len(values)
    if not count:
        return None, None
    mean = math.fsum(values) / count
    if count == 1:
        return mean, None
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    return mean, t_quantile(level, count - 1) * deviation / math.sqrt(count)


def t_quantile(level: float, freedom: int) -> float:
    """Find t with P(|T| <= t) = `level` for Student's distribution with `freedom` >= 1 degrees of freedom.

    The probability is a finite sum in theta = atan(t / sqrt(freedom)) (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4);
    theta is found by bisection to the last bit.
    """
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _within(middle, freedom) < level else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _within(theta: float, freedom: int) -> float:
    """P(|T| <= sqrt(freedom) tan(theta))."""
    odd = freedom % 2
    # Odd: sin (cos + 2/3 cos^3 + 2*4/(3*5) cos^5 ...); even: sin (1 + 1/2 cos^2 + 1*3/(2*4) cos^4 ...); each up to
    # the power freedom - 2.
    term = math.cos(theta) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for power in range(1 + odd, freedom - 2, 2):
        term *= power / (power + 1) * math.cos(theta) ** 2
        total += term
    partial = math.sin(theta) * total
    return 2 / math.pi * (theta + partial) if odd else partial
