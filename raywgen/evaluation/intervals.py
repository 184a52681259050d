"""The confidence interval of a mean."""

from __future__ import annotations

import math

_QUANTILE = 1.96


def half_width(deviation: float, num: int) -> float:
    """Returns half the width of a mean's normal 95 % interval, `1.96 s / sqrt(n)`.

    Args:
        deviation: The sample standard deviation s of the values.
        num: The number n of values.
    """
    return _QUANTILE * deviation / math.sqrt(num)
