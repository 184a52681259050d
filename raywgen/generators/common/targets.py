"""Local targets: the states of trajectories that a stage is trained on; A counts them, X the values of a window."""

from __future__ import annotations

import torch
from torch import Tensor

from raywgen.weights import NormalizerTable, WeightBatch


def normalised_targets(batch: WeightBatch, normalizers: NormalizerTable) -> Tensor:
    """Returns the batch's local targets in generator units, `(B, A, D)`, or windows of them, `(B, A, X)`."""
    assert batch.targets_BAD is not None, "the data holds no local targets"
    return normalised(batch.targets_BAD, batch, normalizers)


def normalised(values_BAD: Tensor, batch: WeightBatch, normalizers: NormalizerTable) -> Tensor:
    """Converts weights of a batch, or of its windows, to generator units; zeros stay beyond the end of a network."""
    normalizer, windows = normalizers[batch.layout.id][1], batch.windows
    if windows is None:
        return normalizer.normalise(values_BAD)
    position_B1X, num_values = windows.position_BX.unsqueeze(1), batch.layout.num_values
    values_BAX = normalizer.normalise(values_BAD, position_B1X.clamp(max=num_values - 1))
    return torch.where(position_B1X < num_values, values_BAX, 0.0)
