"""Leaves parts of conditions out in training, so that a generator can do without them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from raywgen.weights import Condition, KeyedNoise


def with_dropped_parts(condition: Condition, noise: KeyedNoise, share: float, training: bool) -> Condition:
    """Returns the condition as a training step reads it; out of training, and with `share=0`, as it is.

    Args:
        condition: The conditions of B networks.
        noise: B rows of keyed noise; one draw is taken of it where parts are left out.
        share: Share of the networks of which a part is left out, as `dropped_parts` takes it.
        training: Whether the generator is trained.
    """
    if not training or share == 0:
        return condition
    return replace(condition, is_dropped_B2=dropped_parts(noise, share))


def dropped_parts(noise: KeyedNoise, share: float) -> Tensor:
    """Draws whose instruction and samples are left out, bool `(B, 2)`: each alone, or both, a third of `share`."""
    u_B = noise.uniform(1)[:, 0] / share
    no_instruction_B = (u_B < 1 / 3) | ((u_B >= 2 / 3) & (u_B < 1))
    no_samples_B = (u_B >= 1 / 3) & (u_B < 1)
    return torch.stack([no_instruction_B, no_samples_B], dim=1)
