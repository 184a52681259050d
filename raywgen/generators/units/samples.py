"""Measures what a support set says of each input and of each class, beside the task as a whole.

Shape letter beyond the legend in `raywgen.weights`: I channels of the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raywgen.nn.conditions import class_members

_LEAST = 1e-6


@dataclass(frozen=True, slots=True)
class SupportFacts:
    """Moments of the inputs of a support set.

    Attributes:
        mean_BF: Mean of each input.
        variance_BF: Its variance over the samples.
        direction_BCF: Difference of each class's mean to that of all, scaled to unit size; zero for absent classes.
    """

    mean_BF: Tensor
    variance_BF: Tensor
    direction_BCF: Tensor

    def of_channels(self, num_channels: int) -> tuple[Tensor, Tensor] | None:
        """Returns mean and variance `(B, I)` of each channel of the inputs; None where they have none."""
        if self.mean_BF.shape[1] % num_channels:
            return None
        mean_BI = self.mean_BF.unflatten(1, (num_channels, -1)).mean(dim=-1)
        return mean_BI, self.variance_BF.unflatten(1, (num_channels, -1)).mean(dim=-1)


def support_facts(samples_BSF: Tensor, labels_BS: Tensor, max_classes: int) -> SupportFacts:
    """Returns the facts of B support sets; of labels from `max_classes` on no class is known."""
    mean_BF = samples_BSF.mean(dim=1)
    variance_BF = samples_BSF.var(dim=1, unbiased=False)
    spread_B11 = variance_BF.mean(dim=1).sqrt().clamp(min=_LEAST)[:, None, None]
    member_BSC = class_members(labels_BS, max_classes, samples_BSF.dtype)
    count_BC1 = member_BSC.sum(dim=1).unsqueeze(-1)
    centred_BSF = (samples_BSF - mean_BF.unsqueeze(1)) / spread_B11
    means_BCF = torch.einsum("bsc,bsf->bcf", member_BSC, centred_BSF) / count_BC1.clamp(min=1)
    # A mean below a hundredth of the samples' spread is rounding, for instance if all samples have one label.
    size_BC1 = means_BCF.square().mean(dim=2, keepdim=True).sqrt().clamp(min=1e-2)
    return SupportFacts(mean_BF, variance_BF, means_BCF / size_BC1)
