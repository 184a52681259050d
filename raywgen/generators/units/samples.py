"""Follows a support set through the layers that are written, and measures what it says of each input of the next.

Which operations lie between the layers is not known from a layout: rectified units, and pooling to the places that the
next layer reads, are taken for granted. Where that is wrong, what is measured is a hint that fits less well.

Shape letters beyond the legend in `raywgen.weights`: n units of an axis, h and w height and width of a map, P positions
of a map, R rows of a layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from raywgen.nn.conditions import class_members

MOST_SAMPLES = 64
_MOST_POSITIONS = 1024
_LEAST = 1e-6
_MOST_CONTRAST = 3.0


@dataclass(frozen=True, slots=True)
class Facts:
    """Moments of each value that a row reads, over the samples of a support set.

    Attributes:
        mean_BX: Mean of each value.
        variance_BX: Its variance over the samples.
        class_BCX: Difference of each class's mean to that of all; zero for absent classes.
    """

    mean_BX: Tensor
    variance_BX: Tensor
    class_BCX: Tensor

    def directions(self) -> Tensor:
        """Returns the class differences `(B, C, X)`, each scaled to unit size over the values."""
        size_BC1 = self.class_BCX.square().mean(dim=2, keepdim=True).sqrt()
        return self.class_BCX / torch.maximum(size_BC1, self._least())

    def _least(self) -> Tensor:
        """Returns `(B, 1, 1)`, below which a difference is rounding: a hundredth of the samples' spread.

        There are no larger ones where, for instance, all samples have one label.
        """
        return 0.01 * self.variance_BX.sqrt().mean(dim=1)[:, None, None] + _LEAST

    def features(self) -> Tensor:
        """Returns numbers of about unit size for each value, `(B, X, 2 + 2 C)`; means are relative to one another."""
        spread_BX = self.variance_BX.sqrt()
        contrast_BCX = self.class_BCX / (spread_BX.unsqueeze(1) + self._least())
        parts = [
            _standardised(self.mean_BX).unsqueeze(-1),
            _standardised(spread_BX).unsqueeze(-1),
            self.directions().mT,
            contrast_BCX.clamp(-_MOST_CONTRAST, _MOST_CONTRAST).mT,
        ]
        return torch.cat(parts, dim=-1)


@dataclass(frozen=True, slots=True)
class Activations:
    """The values of an axis for the samples of B support sets.

    Attributes:
        values_BSnP: One value of each unit for each sample and position; P is 1 where there are no maps.
        member_BSC: Class of each sample, one-hot; where samples belong to classes in part, they count by the sum.
        grid: Height and width of the maps.
    """

    values_BSnP: Tensor
    member_BSC: Tensor
    grid: tuple[int, int] = (1, 1)

    @classmethod
    def of_samples(cls, samples_BSF: Tensor, labels_BS: Tensor, max_classes: int) -> Activations:
        """Returns the samples themselves, of more than 64 as many at equal distances."""
        num = labels_BS.shape[1]
        if num > MOST_SAMPLES:
            index_S = torch.linspace(0, num - 1, MOST_SAMPLES, device=labels_BS.device).long()
            samples_BSF, labels_BS = samples_BSF[:, index_S], labels_BS[:, index_S]
        return cls(samples_BSF.unsqueeze(-1), class_members(labels_BS, max_classes, samples_BSF.dtype))

    def as_maps(self, num_channels: int) -> Activations | None:
        """Returns flat values as square maps; None where they are not as many."""
        num_values = self.values_BSnP.shape[2]
        side = math.isqrt(num_values // num_channels)
        if num_channels * side**2 != num_values or side**2 > _MOST_POSITIONS:
            return None
        return replace(
            self, values_BSnP=self.values_BSnP.squeeze(-1).unflatten(2, (num_channels, -1)), grid=(side, side)
        )

    def on_grid(self, grid: tuple[int, int]) -> Activations:
        """Returns each unit's values at the places of a grid as values of their own, pooled to these."""
        maps_BSnhw = self.values_BSnP.unflatten(-1, self.grid)
        pooled = nn.functional.adaptive_max_pool2d(maps_BSnhw.flatten(0, 2).unsqueeze(1), grid)
        return replace(self, values_BSnP=pooled.view(*maps_BSnhw.shape[:2], -1, 1), grid=(1, 1))

    def pooled(self, factor: int) -> Activations:
        """Returns each map pooled by a factor."""
        if factor == 1:
            return self
        maps_Xhw = self.values_BSnP.unflatten(-1, self.grid).flatten(0, 2)
        pooled_Xhw = nn.functional.max_pool2d(maps_Xhw.unsqueeze(1), factor).squeeze(1)
        values_BSnP = pooled_Xhw.flatten(1).view(*self.values_BSnP.shape[:3], -1)
        return replace(self, values_BSnP=values_BSnP, grid=(pooled_Xhw.shape[-2], pooled_Xhw.shape[-1]))

    def facts(self) -> Facts:
        """Measures all units, over samples and positions."""
        member_BSC = self.member_BSC.detach()
        weight_BS = member_BSC.sum(dim=2)
        weight_BS = weight_BS / weight_BS.sum(dim=1, keepdim=True).clamp(min=_LEAST)
        place_BSn = self.values_BSnP.mean(dim=3)
        mean_Bn = torch.einsum("bs,bsn->bn", weight_BS, place_BSn)
        square_BSn = (self.values_BSnP - mean_Bn[:, None, :, None]).square().mean(dim=3)
        variance_Bn = torch.einsum("bs,bsn->bn", weight_BS, square_BSn)
        count_BC1 = member_BSC.sum(dim=1).unsqueeze(-1)
        class_BCn = torch.einsum("bsc,bsn->bcn", member_BSC, place_BSn - mean_Bn.unsqueeze(1))
        class_BCn = class_BCn / count_BC1.clamp(min=_LEAST)
        return Facts(mean_Bn, variance_Bn, class_BCn)

    def through(self, weight_BRX: Tensor, kernel: tuple[int, int] | None) -> Activations:
        """Returns what a layer makes of the values.

        Args:
            weight_BRX: Its rows.
            kernel: Height and width where it is a kernel that keeps the size of maps; None for a matrix.
        """
        num_sets, num_samples = self.values_BSnP.shape[:2]
        if kernel is None:
            values_BSR1 = (self.values_BSnP.squeeze(-1) @ weight_BRX.mT).unsqueeze(-1)
            return replace(self, values_BSnP=values_BSR1)
        maps_SXhw = self.values_BSnP.unflatten(-1, self.grid).transpose(0, 1).flatten(1, 2)
        weight = weight_BRX.unflatten(-1, (-1, *kernel)).flatten(0, 1)
        padding = (kernel[0] // 2, kernel[1] // 2)
        found = nn.functional.conv2d(maps_SXhw, weight, padding=padding, groups=num_sets)
        values_BSRP = found.view(num_samples, num_sets, -1, found.shape[2] * found.shape[3]).transpose(0, 1)
        return replace(self, values_BSnP=values_BSRP, grid=(found.shape[2], found.shape[3]))

    def rectified(self, shift_Bn: Tensor | None) -> Activations:
        """Returns the values after a shift, if any, and rectification."""
        values_BSnP = self.values_BSnP if shift_Bn is None else self.values_BSnP + shift_Bn[:, None, :, None]
        return replace(self, values_BSnP=values_BSnP.relu())


def _standardised(x_BX: Tensor) -> Tensor:
    """Scales numbers to mean 0 and size 1 over the values, so that what all have in common hides no difference."""
    centred_BX = x_BX - x_BX.mean(dim=1, keepdim=True)
    return centred_BX / centred_BX.square().mean(dim=1, keepdim=True).sqrt().clamp(min=_LEAST)
