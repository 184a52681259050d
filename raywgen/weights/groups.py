"""Which values of the flat vector share a scale: those of a tensor, or of a filter; and means and sizes of them.

Shape legend: B networks, D values, G groups, V groups that have a mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from raywgen.weights.layout import Layout
from raywgen.weights.tensors import KINDS

# A row of fewer values shares its tensor's scale: a number for so few would cost more than it tells.
_LEAST_FILTER = 16


@dataclass(frozen=True)
class Groups:
    """Consecutive groups that cover the flat vector.

    Attributes:
        rows: Of each tensor with any values, in order: groups it is cut into, and values of each of them.
        firsts: First value of each group.
        kinds: Index in `KINDS` of each group's tensor.
        with_mean: The groups that have a mean: vectors, such as biases and the parts of BatchNorm. Matrices and filters
            lie around zero.
    """

    rows: tuple[tuple[int, int], ...]
    firsts: tuple[int, ...]
    kinds: tuple[int, ...]
    with_mean: tuple[int, ...]

    def means(self, values_BD: Tensor) -> Tensor:
        """Of the groups that have one, `(B, V)`."""
        means_BG = torch.cat([part_BRX.mean(dim=-1) for part_BRX in self._parts(values_BD)], dim=1)
        return means_BG[:, list(self.with_mean)]

    def sizes(self, values_BD: Tensor) -> Tensor:
        """Roots of mean squares, `(B, G)`."""
        return torch.cat([part_BRX.square().mean(dim=-1).sqrt() for part_BRX in self._parts(values_BD)], dim=1)

    def over_values(self, numbers_BG: Tensor) -> Tensor:
        """Each group's number at each of its values, `(B, D)`."""
        return numbers_BG.repeat_interleave(self._num_values_G.to(numbers_BG.device), dim=1)

    def means_over_values(self, means_BM: Tensor) -> Tensor:
        """Likewise of means; zero where a group has none, `(B, D)`."""
        padded = torch.nn.functional.pad(means_BM, (0, 1))
        return self.over_values(padded[:, self._mean_place_G.to(means_BM.device)])

    @cached_property
    def _num_values_G(self) -> Tensor:
        return torch.tensor([size for num, size in self.rows for _ in range(num)])

    @cached_property
    def _mean_place_G(self) -> Tensor:
        """Which mean is a group's; V for none."""
        place_G = torch.full((len(self.firsts),), len(self.with_mean))
        place_G[list(self.with_mean)] = torch.arange(len(self.with_mean))
        return place_G

    def _parts(self, values_BD: Tensor) -> list[Tensor]:
        parts_BX = values_BD.split([num * size for num, size in self.rows], dim=1)
        return [part_BX.unflatten(1, shape) for part_BX, shape in zip(parts_BX, self.rows, strict=True)]


@lru_cache(maxsize=256)
def groups_of(layout: Layout, per: str) -> Groups:
    """The groups of a layout, which follow from its shapes alone.

    Args:
        layout: Of the networks.
        per: `tensor`, or `filter` for each row of a matrix's or convolution's first dimension.
    """
    rows, firsts, kinds, with_mean = [], [], [], []
    first = 0
    for spec in layout.generated:
        if not spec.num_values:
            continue
        num = spec.shape[0] if per == "filter" and len(spec.shape) > 1 else 1
        if spec.num_values < _LEAST_FILTER * num:
            num = 1
        size = spec.num_values // num
        if len(spec.shape) < 2:
            with_mean.append(len(firsts))
        rows.append((num, size))
        firsts += range(first, first + spec.num_values, size)
        kinds += [KINDS.index(spec.kind)] * num
        first += spec.num_values
    return Groups(tuple(rows), tuple(firsts), tuple(kinds), tuple(with_mean))
