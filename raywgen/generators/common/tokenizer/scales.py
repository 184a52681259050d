"""Codes the scales and means of a network's tensors as tokens, in a header before the chunks of its values.

The token sequence of a network is chunks of means, chunks of scales, chunks of values. The layout alone says what each
number of the header stands for and in which unit it is written (`layout_normalizer`). So a decoder needs nothing but
the tokens and the layout, and the base if networks share one. Numbers of similar tensors lie side by side, so that the
position features of a chunk's two ends describe all of it.

**Closed loop.** Scales are measured after subtracting the decoded means, and values are divided by the decoded scales.
So an error in a scale's code only changes the unit in which values are coded; it adds no error to them.

**Windows.** Means and scales follow from two moments of each group (`raywgen.weights.groups`). So a window of a network
needs, beside its values, the moments of the few header chunks that hold the numbers of its own groups.

A mean `m` and a size `s`, in the layout's units, are written as `asinh m` and `2 asinh log s`: nearly linear around
their usual values, and compressed far from them. Compared with `m` and `log s` this gains 0.2 to 0.35 dB at 1, 2 and 4
bits per value, for a published ResNet-44 with one scale a filter, whose weight decay has nearly switched off filters.

Shape letters beyond the legend in `raywgen.weights`: M chunks of a network, G position features, Q groups of values
that share a scale, N moments of a network, Y header chunks, X numbers of the header, or values of a window.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from raywgen.weights import HeaderIndex, Layout, Windows
from raywgen.weights.chunks import BLOCK, from_chunks, num_chunks, num_position_features, span_features, to_chunks
from raywgen.weights.groups import groups_of

# The standard deviation of log sizes between filters of published ResNets.
_SCALE_UNIT = 0.5
# The largest number that is coded: a mean of 200 units, or a scale of 20,000.
_MOST = 6.0
_NUM_FLAGS = 2

Kept = Callable[[Tensor, Tensor], Tensor]
"""Maps header chunks `(B, Y, K)` and their indices `(Y,)` or `(B, Y)` to these chunks after encoding and decoding."""


class HeaderChunkNumbers(NamedTuple):
    """The numbers of some header chunks: as they are encoded, and as they come back, by which values are normalised."""

    written_BYK: Tensor
    kept_BYK: Tensor


class ScaledChunks:
    """The chunks of one layout, with a header of means and scales.

    Attributes:
        num_header_chunks: Number of chunks before those of the values.
        num_chunks: M, the number of all chunks.
    """

    def __init__(self, layout: Layout, per: str, chunk_length: int, device: torch.device | None = None) -> None:
        self._layout, self._per, self._length = layout, per, chunk_length
        self._groups, self._device = groups_of(layout, per), device or torch.device("cpu")
        self._num_mean_chunks = self._groups.num_mean_chunks(chunk_length)
        self.num_header_chunks = self._groups.num_header_chunks(chunk_length)
        self.num_chunks = self.num_header_chunks + num_chunks(layout, chunk_length)

    # Facts about chunks

    @property
    def last_header_chunks(self) -> list[int]:
        """The last chunk of means, if there are means, and the last one of scales, either of which may be padded."""
        means = [self._num_mean_chunks - 1] if self._num_mean_chunks else []
        return [*means, self.num_header_chunks - 1]

    @cached_property
    def mask_MK(self) -> Tensor:
        """The mask of all chunks."""
        return self.mask(torch.arange(self.num_chunks, device=self._device))

    @cached_property
    def positions_MG(self) -> Tensor:
        """The position features of all chunks."""
        return self.positions(torch.arange(self.num_chunks, device=self._device))

    @cached_property
    def mean_position_G(self) -> Tensor:
        """The mean of the position features of all chunks, in memory that does not grow with the network."""
        if self.num_chunks <= BLOCK:
            return self.positions_MG.mean(dim=0)
        total_G = torch.zeros(num_scaled_position_features(), dtype=torch.float64, device=self._device)
        for start in range(0, self.num_chunks, BLOCK):
            index_X = torch.arange(start, min(start + BLOCK, self.num_chunks), device=self._device)
            total_G += self.positions(index_X).sum(dim=0, dtype=torch.float64)
        return (total_G / self.num_chunks).to(torch.get_default_dtype())

    def mask(self, index_X: Tensor) -> Tensor:
        """Returns for some chunks 1 where they hold a number or a value, and 0 for padding, float32 `(X, K)`."""
        _, is_number_XK = self._groups.number_places(index_X, self._length)
        is_value_XK = self._value_position(index_X) < self._layout.num_values
        is_header_X1 = (index_X < self.num_header_chunks).unsqueeze(-1)
        return torch.where(is_header_X1, is_number_XK, is_value_XK).to(torch.float32)

    def positions(self, index_X: Tensor) -> Tensor:
        """Returns the position features `(X, G)` of some chunks, then two flags, for means and for scales."""
        tables = self._groups.tables(index_X.device)
        place_XK, is_number_XK = self._groups.number_places(index_X, self._length)
        last_X1 = (is_number_XK.sum(dim=-1, keepdim=True) - 1).clamp(min=0)
        ends_X2 = torch.cat([place_XK[..., :1], place_XK.gather(-1, last_X1)], dim=-1)
        value_XK = self._value_position(index_X).clamp(0, self._layout.num_values - 1)
        is_header_X1 = (index_X < self.num_header_chunks).unsqueeze(-1)
        ends_X2 = torch.where(is_header_X1, tables.first_G[tables.order_N[ends_X2]], _ends(value_XK))
        first_X, last_X = (end_X.contiguous() for end_X in ends_X2.unbind(-1))
        features_XG = span_features(self._layout, first_X, last_X)
        is_mean_X = index_X < self._num_mean_chunks
        flags_X2 = torch.stack([is_mean_X, is_header_X1.squeeze(-1) & ~is_mean_X], dim=-1)
        return torch.cat([features_XG, flags_X2.to(features_XG.dtype)], dim=-1)

    def scale_index(self, index_X: Tensor) -> Tensor:
        """Returns which numbers scale the values of some chunks, int64 `(X, 4)`.

        These are indices into the header's numbers laid side by side, of the scale and the mean at the chunk's first
        and at its last value; -1 where there is none, as for the header chunks themselves.
        """
        ends_X2 = _ends(self._value_position(index_X)).clamp(0, self._layout.num_values - 1)
        scale_X2, mean_X2 = self._number_index(ends_X2)
        found_X4 = torch.stack([scale_X2, mean_X2], dim=-1).flatten(-2)
        return torch.where((index_X < self.num_header_chunks).unsqueeze(-1), -1, found_X4)

    # Whole networks

    def encode(self, values_BD: Tensor, kept: Kept) -> Tensor:
        """Returns all chunks `(B, M, K)`.

        Args:
            values_BD: Flat vectors in the layout's units.
            kept: Encodes and decodes header chunks; values are normalised by its result.
        """
        moments_BN = self._groups.moments(lambda start, stop: values_BD[:, start:stop])
        index_Y = torch.arange(self.num_header_chunks, device=values_BD.device)
        index_BY = index_Y.expand(len(values_BD), -1)
        header = self.header(
            self.header_moments(moments_BN, index_BY), index_BY, lambda chunks, _: kept(chunks, index_Y)
        )
        mean_BD, scale_BD = self._units(header.kept_BYK)
        return torch.cat([header.written_BYK, to_chunks((values_BD - mean_BD) / scale_BD, self._length)], dim=1)

    def decode(self, chunks_BMK: Tensor) -> Tensor:
        """Returns the values `(B, D)` in the layout's units, differentiable in all chunks."""
        mean_BD, scale_BD = self._units(chunks_BMK[:, : self.num_header_chunks])
        return from_chunks(chunks_BMK[:, self.num_header_chunks :], self._layout.num_values) * scale_BD + mean_BD

    def decode_values(self, values_BX: Tensor, position_X: Tensor, header_BYK: Tensor) -> Tensor:
        """Returns some values in the layout's units, as `decode` does, given the whole header.

        Args:
            values_BX: The coded values.
            position_X: Their positions in the flat vector.
            header_BYK: All header chunks.
        """
        mean_BQ, scale_BQ = self._group_units(header_BYK)
        group_X = self._groups.of_values(position_X)
        return values_BX * scale_BQ[:, group_X] + mean_BQ[:, group_X]

    def _units(self, header_BYK: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the mean that each value is centred by, and the scale that it is divided by, `(B, D)`."""
        mean_BQ, scale_BQ = self._group_units(header_BYK)
        return self._groups.over_values(mean_BQ), self._groups.over_values(scale_BQ)

    def _group_units(self, header_BYK: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the mean and the scale of each group, `(B, Q)`."""
        groups, tables = self._groups, self._groups.tables(header_BYK.device)
        means_BYK, scales_BYK = header_BYK.tensor_split([self._num_mean_chunks], dim=1)
        mean_BM = _mean(from_chunks(means_BYK, groups.num_means))
        mean_BQ = torch.nn.functional.pad(mean_BM, (0, 1))[:, tables.mean_place_G]
        scale_BQ = _scale(from_chunks(scales_BYK, groups.num_groups))[:, tables.scale_place_G]
        return mean_BQ, scale_BQ

    # Windows

    def with_header(self, windows: Windows) -> Windows:
        """Returns windows of chunks of the whole sequence with the header chunks that they follow from."""
        index_BX = windows.index_BW
        # No window touches more groups than this, whichever it is.
        num_groups = self._groups.most_touched(windows.num_values)
        first_B1 = self._value_position(index_BX[:, :1])[..., 0].clamp(0, self._layout.num_values - 1)
        last_B1 = self._value_position(index_BX[:, -1:])[..., -1].clamp(0, self._layout.num_values - 1)
        first_B1, last_B1 = self._groups.of_values(first_B1), self._groups.of_values(last_B1)
        group_BX = first_B1 + torch.arange(num_groups, device=index_BX.device)
        group_BX = torch.minimum(group_BX, last_B1)
        scale_BX = self._index_of_groups(group_BX)[0] // self._length
        scale_BX = torch.cat(
            [torch.where(index_BX < self.num_header_chunks, index_BX, scale_BX[:, :1]), scale_BX], dim=1
        )
        wanted = [scale_BX]
        if self._num_mean_chunks:
            # Of chunks of means, too, which changes nothing.
            mean_BXK = self._mean_index(scale_BX)
            has_mean_BXK = mean_BXK >= 0
            most = self._num_mean_chunks * self._length - 1
            low_BX = torch.where(has_mean_BXK, mean_BXK, most).amin(dim=-1)
            high_BX = torch.where(has_mean_BXK, mean_BXK, 0).amax(dim=-1)
            has_mean_BX = has_mean_BXK.any(dim=-1)
            wanted += [torch.where(has_mean_BX, place // self._length, scale_BX) for place in (low_BX, high_BX)]
        index_BY = _distinct(torch.cat(wanted, dim=1))
        header = HeaderIndex(per=self._per, num_chunks=self.num_header_chunks, index_BY=index_BY)
        return windows.with_header(header)

    def header_moments(self, moments_BN: Tensor, index_BY: Tensor) -> Tensor:
        """Takes the moments of some header chunks, `(B, Y, K)`."""
        return self._groups.header_moments(moments_BN, index_BY, self._length)

    def header(self, moments_BYK: Tensor, index_BY: Tensor, kept: Kept) -> HeaderChunkNumbers:
        """Returns the numbers of some header chunks, among them those of the means of their groups.

        Args:
            moments_BYK: Their moments.
            index_BY: The chunks, in ascending order.
            kept: Encodes and decodes header chunks.
        """
        is_mean_BY1 = (index_BY < self._num_mean_chunks).unsqueeze(-1)
        means_BYK = torch.where(is_mean_BY1, moments_BYK.asinh(), 0.0)
        kept_means_BYK, square_BYK = means_BYK, moments_BYK
        if self._num_mean_chunks:
            kept_means_BYK, mean_BYK = kept(means_BYK, index_BY), self._mean_index(index_BY)
            centre_BYK = numbers_at(_mean(kept_means_BYK), index_BY, mean_BYK)
            square_BYK = square_BYK + (numbers_at(moments_BYK, index_BY, mean_BYK) - centre_BYK).square()
        scales_BYK = (square_BYK.sqrt().log().asinh() / _SCALE_UNIT).clamp(-_MOST, _MOST)
        # Padding is zero, which no scale is.
        scales_BYK = torch.where(self._groups.number_places(index_BY, self._length)[1], scales_BYK, 0.0)
        written_BYK = torch.where(is_mean_BY1, means_BYK, scales_BYK)
        kept_BYK = torch.where(is_mean_BY1, kept_means_BYK, kept(written_BYK, index_BY))
        return HeaderChunkNumbers(written_BYK, kept_BYK)

    def window(self, values_BX: Tensor, windows: Windows, header: HeaderChunkNumbers) -> Tensor:
        """Returns the chunks `(B, W, K)` of windows, some of which may be header chunks.

        Args:
            values_BX: The values of the windows in the layout's units.
            windows: The windows with their header chunks.
            header: The numbers of these.
        """
        assert windows.header is not None
        index_BY, position_BX = windows.header.index_BY, windows.position_BX
        is_real_BX = (position_BX >= 0) & (position_BX < self._layout.num_values)
        scale_BX, mean_BX = self._number_index(position_BX.clamp(0, self._layout.num_values - 1))
        unit_BX = numbers_at(_scale(header.kept_BYK), index_BY, scale_BX)
        scaled_BX = (values_BX - numbers_at(_mean(header.kept_BYK), index_BY, mean_BX)) / unit_BX
        chunks_BWK = torch.where(is_real_BX, scaled_BX, 0.0).unflatten(1, (-1, self._length))
        index_BW = windows.index_BW
        place_BW1 = _place(index_BY, index_BW).unsqueeze(-1)
        own_BWK = header.written_BYK.gather(1, place_BW1.expand(-1, -1, self._length))
        return torch.where((index_BW < self.num_header_chunks).unsqueeze(-1), own_BWK, chunks_BWK)

    def _value_position(self, index_X: Tensor) -> Tensor:
        """Returns the positions in the flat vector of the values of some chunks, `(X, K)`; negative in the header."""
        first_X1 = (index_X - self.num_header_chunks).unsqueeze(-1) * self._length
        return first_X1 + torch.arange(self._length, device=index_X.device)

    def _number_index(self, position_X: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the indices of the scale and the mean of values, as `scale_index` does."""
        return self._index_of_groups(self._groups.of_values(position_X))

    def _index_of_groups(self, group_X: Tensor) -> tuple[Tensor, Tensor]:
        tables = self._groups.tables(group_X.device)
        mean_X = tables.mean_place_G[group_X]
        scale_X = self._num_mean_chunks * self._length + tables.scale_place_G[group_X]
        return scale_X, torch.where(mean_X < self._groups.num_means, mean_X, -1)

    def _mean_index(self, index_X: Tensor) -> Tensor:
        """Returns the index of the mean of the group of each scale in some header chunks, `(X, K)`; -1 for none."""
        place_XK, is_number_XK = self._groups.number_places(index_X, self._length)
        _, mean_XK = self._index_of_groups(self._groups.tables(index_X.device).order_N[place_XK])
        is_scale_XK = is_number_XK & (index_X >= self._num_mean_chunks).unsqueeze(-1)
        return torch.where(is_scale_XK, mean_XK, -1)


def numbers_at(numbers_BYK: Tensor, index_BY: Tensor, number_BX: Tensor) -> Tensor:
    """Takes numbers of the header, given some of its chunks.

    Args:
        numbers_BYK: The numbers of these chunks.
        index_BY: The chunks, in ascending order.
        number_BX: Indices, into the header's numbers laid side by side, in any shape that begins with B; -1 gives 0.
    """
    length = numbers_BYK.shape[2]
    flat_BX = number_BX.clamp(min=0).flatten(1)
    place_BX = _place(index_BY, flat_BX // length) * length + flat_BX % length
    return torch.where(number_BX >= 0, numbers_BYK.flatten(1).gather(1, place_BX).view(number_BX.shape), 0.0)


def _place(index_BY: Tensor, chunk_BX: Tensor) -> Tensor:
    """Returns where chunks lie among those of ascending indices; anywhere for those that do not."""
    return torch.searchsorted(index_BY.contiguous(), chunk_BX.contiguous()).clamp(max=index_BY.shape[1] - 1)


def _distinct(index_BX: Tensor) -> Tensor:
    """Returns the different indices of each row in ascending order; shorter rows repeat their last one."""
    sorted_BX = index_BX.sort(dim=1).values
    place_BX = (sorted_BX.diff(dim=1, prepend=sorted_BX[:, :1]) > 0).cumsum(dim=1)
    # How many differ is unknown of tensors without values.
    num = sorted_BX.shape[1] if sorted_BX.is_meta else int(place_BX[:, -1].max()) + 1
    last_BY = sorted_BX[:, -1:].repeat(1, num)
    return last_BY.scatter(1, place_BX, sorted_BX)


def _ends(places_XK: Tensor) -> Tensor:
    """Returns the first and the last of each row, `(X, 2)`."""
    return torch.stack([places_XK[..., 0], places_XK[..., -1]], dim=-1)


def _mean(number_X: Tensor) -> Tensor:
    """Returns the means, in the layout's units, that numbers of the header stand for.

    In single precision, the last bit of torch's `sinh` depends on where in a tensor a number stands.
    """
    return number_X.double().clamp(-_MOST, _MOST).sinh().to(number_X.dtype)


def _scale(number_X: Tensor) -> Tensor:
    """Returns the positive scales that numbers of the header stand for."""
    return (_SCALE_UNIT * number_X.double().clamp(-_MOST, _MOST)).sinh().exp().to(number_X.dtype)


@lru_cache(maxsize=64)
def scaled_chunks(layout: Layout, per: str, chunk_length: int, device: torch.device | None = None) -> ScaledChunks:
    """Returns the chunks of a layout with its scales; the result is shared between calls."""
    return ScaledChunks(layout, per, chunk_length, device)


def num_scaled_position_features() -> int:
    """Returns G, the length of a row of `ScaledChunks.positions`."""
    return num_position_features() + _NUM_FLAGS
