"""Local targets: the states of trajectories that a stage is trained on; A counts them."""

from __future__ import annotations

from torch import Tensor

from raywgen.weights import NormalizerTable, WeightBatch


def normalised_targets(batch: WeightBatch, normalizers: NormalizerTable) -> Tensor:
    """Returns the batch's local targets in generator units, `(B, A, D)`."""
    assert batch.targets_BAD is not None, "the data holds no local targets"
    return normalizers[batch.layout.id][1].normalise(batch.targets_BAD)
