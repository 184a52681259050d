"""Scales and means of a network's tensors as numbers of about unit size, in leading chunks of its token sequence.

The sequence of a layout is chunks of means, chunks of scales, chunks of values. What each number stands for, and its
unit, follow from the layout alone (`layout_normalizer`), so that nothing else has to be known to decode, but a base
where networks share one. Numbers of like tensors stand side by side, so that a chunk's ends tell what lies between.

**Closed loop.** Scales are measured about what the code keeps of the means, and values are divided by what it keeps of
the scales. So the error of a scale's code only changes the unit in which values are coded; it is not added to theirs.

A mean `m` and a size `s`, in the layout's units, are written as `asinh m` and `2 asinh log s`: as they are near their
usual values, squeezed far from them. Over `m` and `log s` that is worth 0.2 to 0.35 dB at 1, 2 and 4 bits per value, of
a published ResNet-44 with a scale a filter: filters that weight decay has switched off lie far out.

Shape legend: B networks, D values, G groups that share a scale, V groups that have a mean, X numbers, M chunks,
K values of a chunk, P place features.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from raywgen.weights import Layout, Normalizer, layout_normalizer, shares_start
from raywgen.weights.chunks import (
    chunk_mask,
    from_chunks,
    num_place_features,
    place_features,
    span_features,
    to_chunks,
)
from raywgen.weights.groups import groups_of

# Filters of published ResNets deviate by this much.
_SCALE_UNIT = 0.5
# Means of 200 units, and scales of 20,000.
_MOST = 6.0
_NUM_FLAGS = 2

Kept = Callable[[Tensor, slice], Tensor]
"""What is decoded of leading chunks `(B, X, K)`, and which chunks of the sequence they are."""


class ScaledChunks:
    """The chunks of one layout with its scales among them.

    Attributes:
        num_leading: Chunks before those of the values.
        own_MF: Which numbers of the leading chunks, laid side by side, each chunk's values are written in: scale and
            mean at its first, then at its last value. -1 where there is none.
        mask_MK: Which numbers and values of all chunks are real.
        places_MP: What is known of each chunk's place; as `place_features`, then whether it holds means, and scales.
    """

    def __init__(self, layout: Layout, per: str, chunk_length: int) -> None:
        self._groups = groups_of(layout, per)
        self._num_values, self._length = layout.num_values, chunk_length
        firsts_G, kinds_G = torch.tensor(self._groups.firsts), torch.tensor(self._groups.kinds)
        mean_groups_V = torch.tensor(self._groups.with_mean, dtype=torch.int64)
        self._mean_order_X = kinds_G[mean_groups_V].argsort(stable=True)
        self._scale_order_X = kinds_G.argsort(stable=True)
        masks, places = [], []
        for flag, groups_X in enumerate((mean_groups_V[self._mean_order_X], self._scale_order_X)):
            masks.append(to_chunks(torch.ones(1, len(groups_X)), chunk_length)[0])
            start_M = torch.arange(0, len(groups_X), chunk_length)
            stop_M = (start_M + chunk_length - 1).clamp(max=len(groups_X) - 1)
            ends_MP = span_features(layout, firsts_G[groups_X[start_M]], firsts_G[groups_X[stop_M]])
            places.append(_flagged(ends_MP, flag))
        self._num_means, self._num_scales = (len(mask_MK) for mask_MK in masks)
        self.num_leading = self._num_means + self._num_scales
        self.mask_MK = torch.cat([*masks, chunk_mask(layout, chunk_length)])
        self.places_MP = torch.cat([*places, _flagged(place_features(layout, chunk_length), None)])
        self.own_MF = self._own(firsts_G)

    def encode(self, values_BD: Tensor, kept: Kept) -> Tensor:
        """All chunks `(B, M, K)`.

        Args:
            values_BD: In the layout's units.
            kept: What the code keeps of leading chunks; values are normalised by that.
        """
        mean_BX = self._groups.means(values_BD).asinh()[:, self._mean_order_X.to(values_BD.device)]
        means_BMK = to_chunks(mean_BX, self._length)
        centred_BD = values_BD - self._mean(kept(means_BMK, slice(0, self._num_means)))
        scale_BX = self._groups.sizes(centred_BD).log().asinh()[:, self._scale_order_X.to(values_BD.device)]
        scales_BMK = to_chunks((scale_BX / _SCALE_UNIT).clamp(-_MOST, _MOST), self._length)
        scaled_BD = centred_BD / self._scale(kept(scales_BMK, slice(self._num_means, self.num_leading)))
        return torch.cat([means_BMK, scales_BMK, to_chunks(scaled_BD, self._length)], dim=1)

    def decode(self, chunks_BMK: Tensor) -> Tensor:
        """Values `(B, D)` in the layout's units; differentiable in all chunks."""
        sizes = [self._num_means, self._num_scales, chunks_BMK.shape[1] - self.num_leading]
        means_BMK, scales_BMK, scaled_BMK = chunks_BMK.split(sizes, dim=1)
        return from_chunks(scaled_BMK, self._num_values) * self._scale(scales_BMK) + self._mean(means_BMK)

    def _own(self, firsts_G: Tensor) -> Tensor:
        """Returns the attribute of that name."""
        start_M = torch.arange(0, self._num_values, self._length)
        ends_M2 = torch.stack([start_M, (start_M + self._length - 1).clamp(max=self._num_values - 1)], dim=1)
        group_M2 = torch.searchsorted(firsts_G, ends_M2, right=True) - 1
        mean_place_G = torch.full_like(firsts_G, -1)
        mean_place_G[list(self._groups.with_mean)] = self._mean_order_X.argsort()
        scale_place_G = self._num_means * self._length + self._scale_order_X.argsort()
        own_MF = torch.stack([scale_place_G[group_M2], mean_place_G[group_M2]], dim=2).flatten(1)
        return torch.cat([own_MF.new_full((self.num_leading, own_MF.shape[1]), -1), own_MF])

    def _mean(self, means_BMK: Tensor) -> Tensor:
        """Spreads the numbers to each value, `(B, D)`."""
        mean_BX = from_chunks(means_BMK, len(self._mean_order_X)).clamp(-_MOST, _MOST).sinh()
        return self._groups.means_over_values(mean_BX[:, self._mean_order_X.argsort().to(mean_BX.device)])

    def _scale(self, scales_BMK: Tensor) -> Tensor:
        """Spreads the positive scales to each value, `(B, D)`."""
        number_BX = from_chunks(scales_BMK, len(self._scale_order_X)).clamp(-_MOST, _MOST)
        scale_BX = (_SCALE_UNIT * number_BX).sinh().exp()
        return self._groups.over_values(scale_BX[:, self._scale_order_X.argsort().to(scale_BX.device)])


@lru_cache(maxsize=64)
def scaled_chunks(layout: Layout, per: str, chunk_length: int) -> ScaledChunks:
    """Returns the scales of a layout; shared between calls."""
    return ScaledChunks(layout, per, chunk_length)


def num_scaled_place_features() -> int:
    """P, the length of a row of `ScaledChunks.places_MP`."""
    return num_place_features() + _NUM_FLAGS


def unit_normalizer(layout: Layout, normalizer: Normalizer) -> Normalizer:
    """Returns the layout's own scales, with the base that networks share or else the one that the layout implies."""
    return layout_normalizer(layout, normalizer.base_D if shares_start(layout, normalizer) else None)


def _flagged(places_MG: Tensor, flag: int | None) -> Tensor:
    flags_MF = places_MG.new_zeros(len(places_MG), _NUM_FLAGS)
    if flag is not None:
        flags_MF[:, flag] = 1.0
    return torch.cat([places_MG, flags_MF], dim=1)
