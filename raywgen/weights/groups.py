"""Groups of values that share a scale (a tensor or a filter each), with their means and sizes.

Means and sizes of a network's groups fill the header of its token sequence: chunks of means, then chunks of sizes.
Numbers of similar tensors lie side by side in it. They follow from two moments of each group, which are measured in one
pass over the network, part by part; so windows of it need no more than the moments of their own groups.

Shape letters beyond the legend in `raywgen.weights`: G groups, M groups that have a mean, N = M + G moments of a
network, R groups of a tensor, Y header chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from raywgen.weights.layout import Layout
from raywgen.weights.normalizer import Normalizer, layout_normalizer
from raywgen.weights.tensors import KINDS

# Shorter rows share their tensor's scale, because a scale for so few values costs more than it helps.
_LEAST_FILTER = 16
# Values that are summed at once, in an order that does not depend on how much of a network is read at once.
_SUMMED = 1 << 14
_READ = 1 << 20

ReadValues = Callable[[int, int], Tensor]
"""Returns the values `(B, stop - start)` of B networks, given the first of them and their end."""


class GroupTables(NamedTuple):
    """The facts about groups, as tensors on one device.

    Attributes:
        first_G: Position of the first value of each group.
        num_values_G: Number of values of each group.
        mean_place_G: Place of each group's mean among the means in the header; M where it has none.
        scale_place_G: Place of each group's size among the sizes in the header.
        order_N: The group of each moment, in the order of the header.
    """

    first_G: Tensor
    num_values_G: Tensor
    mean_place_G: Tensor
    scale_place_G: Tensor
    order_N: Tensor


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

    @property
    def num_means(self) -> int:
        """M, the number of groups that have a mean."""
        return len(self.with_mean)

    @property
    def num_groups(self) -> int:
        """G, the number of groups."""
        return len(self.firsts)

    @cached_property
    def num_values(self) -> int:
        """D, the number of values of all groups."""
        return sum(num * size for num, size in self.rows)

    def moments(self, read: ReadValues) -> Tensor:
        """Returns the moments of the groups of B networks, float `(B, N)`, in the order of the header.

        These are the means of the groups that have one, then for each group its mean square, about the mean if it has
        one. However much of a network is read at once, the result is the same to the last bit.
        """
        pieces = [sums for rows in self._sums(read) for sums in rows]
        total_BG, square_BG = (torch.cat(parts, dim=1) for parts in zip(*pieces, strict=True))
        tables = self.tables(total_BG.device)
        mean_BG = total_BG / tables.num_values_G
        has_mean_G = tables.mean_place_G < self.num_means
        about_BG = square_BG / tables.num_values_G - torch.where(has_mean_G, mean_BG, 0.0).square()
        mean_order_M, scale_order_G = tables.order_N.tensor_split([self.num_means])
        moments = [mean_BG[:, mean_order_M], about_BG.clamp(min=0)[:, scale_order_G]]
        return torch.cat(moments, dim=1).to(torch.get_default_dtype())

    def num_mean_chunks(self, chunk_length: int) -> int:
        """Returns the number of header chunks that hold means."""
        return -(-self.num_means // chunk_length)

    def num_header_chunks(self, chunk_length: int) -> int:
        """Returns the number of header chunks."""
        return self.num_mean_chunks(chunk_length) + -(-self.num_groups // chunk_length)

    def number_places(self, index_X: Tensor, chunk_length: int) -> tuple[Tensor, Tensor]:
        """Returns where the numbers of header chunks lie among the moments, `(X, K)`, and which of them there are."""
        num_mean_chunks, M = self.num_mean_chunks(chunk_length), self.num_means
        is_mean_X1 = (index_X < num_mean_chunks).unsqueeze(-1)
        offset_K = torch.arange(chunk_length, device=index_X.device)
        place_XK = index_X.unsqueeze(-1) * chunk_length + offset_K
        place_XK = torch.where(is_mean_X1, place_XK, place_XK + (M - num_mean_chunks * chunk_length))
        is_there_XK = place_XK < torch.where(is_mean_X1, M, M + self.num_groups)
        return place_XK.clamp(max=M + self.num_groups - 1), is_there_XK

    def header_moments(self, moments_BN: Tensor, index_BY: Tensor, chunk_length: int) -> Tensor:
        """Takes the moments of some header chunks of each network, `(B, Y, K)`; zero where there is none."""
        place_BYK, is_there_BYK = self.number_places(index_BY, chunk_length)
        return moments_BN.gather(1, place_BYK.flatten(1)).view(place_BYK.shape) * is_there_BYK

    def of_values(self, position_X: Tensor) -> Tensor:
        """Returns the group of the value at each position of the flat vector."""
        return torch.searchsorted(self.tables(position_X.device).first_G, position_X.contiguous(), right=True) - 1

    def most_touched(self, num_values: int) -> int:
        """Returns how many groups a window of so many values touches at most."""
        if num_values not in self._most_touched:
            first_G = np.array(self.firsts)
            last_G = np.append(first_G[1:], self.num_values) - 1
            stop_G = np.searchsorted(first_G, last_G + num_values - 1, side="right")
            self._most_touched[num_values] = int((stop_G - np.arange(len(first_G))).max())
        return self._most_touched[num_values]

    def over_values(self, numbers_BG: Tensor) -> Tensor:
        """Spreads each group's number over its values, `(B, D)`."""
        num_values_G = self.tables(numbers_BG.device).num_values_G
        return numbers_BG.repeat_interleave(num_values_G, dim=1, output_size=self.num_values)

    def tables(self, device: torch.device) -> GroupTables:
        """Returns the facts about groups on a device; computed once."""
        if device not in self._tables_by_device:
            self._tables_by_device[device] = GroupTables(*(tensor.to(device) for tensor in self._new_tables()))
        return self._tables_by_device[device]

    @cached_property
    def _tables_by_device(self) -> dict[torch.device, GroupTables]:
        return {}

    @cached_property
    def _most_touched(self) -> dict[int, int]:
        return {}

    def _new_tables(self) -> GroupTables:
        kinds_G, with_mean_M = np.array(self.kinds), np.array(self.with_mean, dtype=np.int64)
        scale_order_G = kinds_G.argsort(kind="stable")
        mean_order_M = with_mean_M[kinds_G[with_mean_M].argsort(kind="stable")]
        mean_place_G = np.full(self.num_groups, self.num_means)
        mean_place_G[mean_order_M] = np.arange(self.num_means)
        first_G = np.array(self.firsts)
        num_values_G = np.diff(first_G, append=self.num_values)
        order_N = np.concatenate([mean_order_M, scale_order_G])
        tables = (first_G, num_values_G, mean_place_G, scale_order_G.argsort(), order_N)
        return GroupTables(*(torch.tensor(table) for table in tables))

    def _sums(self, read: ReadValues) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
        first = 0
        for num, size in self.rows:
            yield _tensor_sums(read, first, num, size)
            first += num * size


def _tensor_sums(read: ReadValues, first: int, num: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the sums of values and of squares of some groups of a tensor after another, float64 `(B, R)`."""
    if size <= _SUMMED:
        at_once = max(1, _READ // size)
        for group in range(0, num, at_once):
            count = min(at_once, num - group)
            start = first + group * size
            values_BRX = read(start, start + count * size).double().unflatten(1, (count, size))
            yield values_BRX.sum(dim=-1), values_BRX.square().sum(dim=-1)
        return
    for start in range(first, first + num * size, size):
        parts = []
        for place in range(start, start + size, _READ):
            values_BX = read(place, min(place + _READ, start + size)).double()
            parts += [(part.sum(dim=1), part.square().sum(dim=1)) for part in values_BX.split(_SUMMED, dim=1)]
        total_BR, square_BR = (torch.stack(sums, dim=1) for sums in zip(*parts, strict=True))
        yield total_BR.sum(dim=1, keepdim=True), square_BR.sum(dim=1, keepdim=True)


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


def network_moments(layout: Layout, per: str, normalizer: Normalizer, read: ReadValues) -> Tensor:
    """Returns the moments `(B, N)` of networks in the layout's own units, about the start that they share if they do.

    Args:
        layout: Layout of the networks.
        per: As `groups_of` takes it.
        normalizer: The normaliser of the layout, of which only the start counts.
        read: Reads weights, a part of the networks at a time; on the normaliser's device.
    """
    units = unit_normalizer(layout, normalizer)

    def read_units(start: int, stop: int) -> Tensor:
        position_1X = torch.arange(start, stop, device=normalizer.scale_N.device).unsqueeze(0)
        return units.normalise(read(start, stop), position_1X)

    return groups_of(layout, per).moments(read_units)


def unit_normalizer(layout: Layout, normalizer: Normalizer) -> Normalizer:
    """Returns the normaliser of the layout's own units, about the start that networks share if they share one."""
    return layout_normalizer(layout, normalizer.start_D, normalizer.scale_N.device)
