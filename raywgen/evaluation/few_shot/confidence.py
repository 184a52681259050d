"""Confidence intervals of means over episodes.

The interval is the normal one, `mean +- 1.96 s / sqrt(n)`, with s the standard deviation over the episodes. It covers
the choice of episodes, not that of the training seed.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from raywgen.evaluation.few_shot.errors import FewShotError
from raywgen.evaluation.intervals import half_width


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its 95 % interval.

    Attributes:
        mean: Mean over the episodes.
        half_width: The interval is from `mean - half_width` to `mean + half_width`.
    """

    mean: float
    half_width: float


def estimate(values: Tensor) -> Estimate:
    """Returns the mean of one value per episode, with its 95 % interval.

    Raises:
        FewShotError: There are fewer than two values.
    """
    if values.dim() != 1 or len(values) < 2:
        raise FewShotError(f"values {tuple(values.shape)}: an interval needs a vector of at least two episodes")
    exact = values.double()
    return Estimate(mean=float(exact.mean()), half_width=half_width(float(exact.std(correction=1)), len(exact)))


def paired_difference(values: Tensor, other: Tensor) -> Estimate:
    """Returns the mean of `values - other`, with its interval; both are of the same episodes in the same order.

    Raises:
        FewShotError: They are not equally many, or fewer than two.
    """
    if values.shape != other.shape:
        raise FewShotError(
            f"values of {tuple(values.shape)} and {tuple(other.shape)} episodes are no pairs; judge both on the same"
        )
    return estimate(values.double() - other.double())
