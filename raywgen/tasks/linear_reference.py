"""The least that a network written for a task must reach: what a linear classifier learns from the same few samples."""

from __future__ import annotations

import torch
from torch import Tensor

from raywgen.tasks.ridge_head import fit_ridge_head
from raywgen.tasks.stacked import balanced_accuracy

# The time grows with the cube of the number of samples.
_MOST_SAMPLES = 256


@torch.no_grad()
def left_out_accuracy(samples_SF: Tensor, labels_S: Tensor) -> float:
    """Returns the balanced accuracy of ridge regression on each sample, fitted to the others, its strength chosen so.

    Args:
        samples_SF: Samples, flattened; of more than 256, as many are taken at equal distances.
        labels_S: Their classes, int64.
    """
    if len(labels_S) > _MOST_SAMPLES:
        index_S = torch.linspace(0, len(labels_S) - 1, _MOST_SAMPLES).long()
        samples_SF, labels_S = samples_SF[index_S], labels_S[index_S]
    present_C, own_S = labels_S.unique(return_inverse=True)
    head = fit_ridge_head(samples_SF.reshape(1, len(own_S), -1).double().cpu(), own_S[None].cpu(), len(present_C))
    return float(balanced_accuracy(head.left_out_BSC, own_S.cpu()))
