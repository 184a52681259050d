"""Leaves parts of conditions out in training, so that a generator can do without them."""

from __future__ import annotations

import torch
from torch import Tensor

from raywgen.weights import KeyedNoise


def dropped_parts(noise: KeyedNoise, share: float) -> Tensor:
    """Draws whose instruction and samples are left out, bool `(B, 2)`: each alone, or both, a third of `share`."""
    u_B = noise.uniform(1)[:, 0] / share
    no_instruction_B = (u_B < 1 / 3) | ((u_B >= 2 / 3) & (u_B < 1))
    no_samples_B = (u_B >= 1 / 3) & (u_B < 1)
    return torch.stack([no_instruction_B, no_samples_B], dim=1)
