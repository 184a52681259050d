"""Confidence intervals of means over episodes.

The interval is the normal one, `mean +- 1.96 s / sqrt(n)`, with s the standard deviation over the episodes: it says
what other episodes would give, not what other training seeds would.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from raywgen.evaluation.few_shot.errors import FewShotError

_QUANTILE = 1.96


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its 95 % interval.

    Attributes:
        mean: Over the episodes.
        half_width: The interval is from `mean - half_width` to `mean + half_width`.
        num: Episodes.
    """

    mean: float
    half_width: float
    num: int

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.mean + self.half_width

    def __str__(self) -> str:
        return f"{self.mean:.2f} +- {self.half_width:.2f}"


def estimate(values: Tensor) -> Estimate:
    """Mean and 95 % interval of one value an episode.

    Raises:
        FewShotError: There are fewer than two values.
    """
    if values.dim() != 1 or len(values) < 2:
        raise FewShotError(f"values {tuple(values.shape)}: an interval needs a vector of at least two episodes")
    exact = values.double()
    half_width = _QUANTILE * float(exact.std(correction=1)) / len(exact) ** 0.5
    return Estimate(mean=float(exact.mean()), half_width=half_width, num=len(exact))


def paired_difference(values: Tensor, other: Tensor) -> Estimate:
    """Mean of `values - other` and its interval, both on the same episodes in the same order.

    Raises:
        FewShotError: They are not equally many, or fewer than two.
    """
    if values.shape != other.shape:
        raise FewShotError(
            f"values of {tuple(values.shape)} and {tuple(other.shape)} episodes are no pairs; judge both on the same"
        )
    return estimate(values.double() - other.double())
