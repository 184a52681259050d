"""Mean and spread of each tensor over many checkpoints, in memory that grows neither with their number nor size.

Blocks are merged by the rule of Chan, Golub and LeVeque (1979), eq. 2.1, in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from raywgen.training.stored_weights import Weights
from raywgen.weights import Layout, Normalizer

# Values that are read at once.
_BLOCK = 1 << 22


@dataclass(slots=True)
class Moments:
    """Count, mean and sum of squares about the mean of the values that were seen.

    Attributes:
        count: Values seen.
        mean: Their mean.
        squares: Sum of their squared distances from it.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, values: Tensor) -> None:
        """Adds more values."""
        count = values.numel()
        if not count:
            return
        mean, total = float(values.mean()), self.count + count
        offset = mean - self.mean
        self.squares += float(values.std(unbiased=False)) ** 2 * count + offset**2 * self.count * count / total
        self.mean += offset * count / total
        self.count = total

    @property
    def deviation(self) -> float:
        """The standard deviation of all values; 1 where there are none."""
        return (self.squares / self.count) ** 0.5 if self.count else 1.0


def measured_normalizer(weights: Weights, layout: Layout, start_D: Tensor | None) -> Normalizer:
    """Takes the normaliser of a layout from its training networks, in one pass.

    Args:
        weights: The networks.
        layout: Their layout.
        start_D: The start that they share, if they share one.
    """
    moments = [Moments() for _ in layout.generated]
    for first, values_BX in _blocks(weights, layout.num_values):
        start_X = None if start_D is None else start_D[first : first + values_BX.shape[1]]
        _add_block(moments, layout, first, values_BX, start_X)
    means = torch.tensor([each.mean for each in moments])
    scales = torch.tensor([each.deviation for each in moments])
    return Normalizer.from_units(layout, means, scales, start_D)


def _blocks(weights: Weights, num_values: int) -> Iterator[tuple[int, Tensor]]:
    """Yields whole networks, or where these are large parts of them, with the position of their first value."""
    if num_values <= _BLOCK:
        rows = max(1, _BLOCK // max(1, num_values))
        for start in range(0, len(weights), rows):
            yield 0, weights.values(torch.arange(start, min(start + rows, len(weights))))
        return
    for row in range(len(weights)):
        for first in range(0, num_values, _BLOCK):
            length = min(_BLOCK, num_values - first)
            yield first, weights.windows(torch.tensor([row]), torch.tensor([first]), length)


def _add_block(moments: list[Moments], layout: Layout, first: int, values_BX: Tensor, start_X: Tensor | None) -> None:
    """Adds the part of each tensor that a block holds, in the units of a normaliser."""
    last = first + values_BX.shape[1]
    stops = accumulate(spec.num_values for spec in layout.generated)
    for spec, stop, seen in zip(layout.generated, stops, moments, strict=True):
        a, b = max(first, stop - spec.num_values) - first, min(last, stop) - first
        if a >= b:
            continue
        part = Normalizer.in_units(spec, values_BX[:, a:b])
        seen.add(part if start_X is None else part - Normalizer.in_units(spec, start_X[a:b]))
