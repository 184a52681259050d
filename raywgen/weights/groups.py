"""Groups of values that share a scale (a tensor or a filter each), with their means and sizes.

Shape letters beyond the legend in `raywgen.weights`: G groups, M groups that have a mean, R groups of a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from raywgen.weights.layout import Layout
from raywgen.weights.tensors import KINDS

# Shorter rows share their tensor's scale, because a scale for so few values costs more than it helps.
_LEAST_FILTER = 16


class _Tables(NamedTuple):
    """The facts about groups, as tensors on one device.

    Attributes:
        num_values_G: Number of values of each group.
        with_mean_M: The groups that have a mean.
        mean_place_G: Index of each group's mean; M where it has none.
    """

    num_values_G: Tensor
    with_mean_M: Tensor
    mean_place_G: Tensor


@dataclass(frozen=True)
class Groups:
    """Consecutive groups that cover the flat vector.

    Attributes:
        rows: For each non-empty tensor, in order, its number of groups and the number of values of each group.
        firsts: Position of the first value of each group.
        kinds: Index in `KINDS` of each group's tensor.
        with_mean: The groups that have a mean: vectors, such as biases and the parts of BatchNorm. Matrices and filters
            lie around zero.
    """

    rows: tuple[tuple[int, int], ...]
    firsts: tuple[int, ...]
    kinds: tuple[int, ...]
    with_mean: tuple[int, ...]

    def means(self, values_BD: Tensor) -> Tensor:
        """Returns the means of the groups that have one, `(B, M)`."""
        means_BG = torch.cat([part_BRX.mean(dim=-1) for part_BRX in self._parts(values_BD)], dim=1)
        return means_BG[:, self._tables(values_BD.device).with_mean_M]

    def sizes(self, values_BD: Tensor) -> Tensor:
        """Returns the root of the mean square of each group, `(B, G)`."""
        return torch.cat([part_BRX.square().mean(dim=-1).sqrt() for part_BRX in self._parts(values_BD)], dim=1)

    def over_values(self, numbers_BG: Tensor) -> Tensor:
        """Spreads each group's number over its values, `(B, D)`."""
        num_values_G = self._tables(numbers_BG.device).num_values_G
        return numbers_BG.repeat_interleave(num_values_G, dim=1, output_size=self._num_values)

    def means_over_values(self, means_BM: Tensor) -> Tensor:
        """Spreads means over values, `(B, D)`; zero where a group has none."""
        padded = torch.nn.functional.pad(means_BM, (0, 1))
        return self.over_values(padded[:, self._tables(means_BM.device).mean_place_G])

    @cached_property
    def _num_values(self) -> int:
        return sum(num * size for num, size in self.rows)

    def _tables(self, device: torch.device) -> _Tables:
        if device not in self._tables_by_device:
            num_values_G = torch.tensor([size for num, size in self.rows for _ in range(num)])
            with_mean_M = torch.tensor(self.with_mean, dtype=torch.int64)
            place_G = torch.full((len(self.firsts),), len(self.with_mean))
            place_G[with_mean_M] = torch.arange(len(self.with_mean))
            tables = _Tables(*(tensor.to(device) for tensor in (num_values_G, with_mean_M, place_G)))
            self._tables_by_device[device] = tables
        return self._tables_by_device[device]

    @cached_property
    def _tables_by_device(self) -> dict[torch.device, _Tables]:
        return {}

    def _parts(self, values_BD: Tensor) -> list[Tensor]:
        parts_BX = values_BD.split([num * size for num, size in self.rows], dim=1)
        return [part_BX.unflatten(1, shape) for part_BX, shape in zip(parts_BX, self.rows, strict=True)]


@lru_cache(maxsize=256)
def groups_of(layout: Layout, per: str) -> Groups:
    """Returns the groups of a layout, which follow from its shapes alone.

    Args:
        layout: Layout of the networks.
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
