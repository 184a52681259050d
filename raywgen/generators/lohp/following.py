"""Follows the policy from a start of zeros to the end of its path, differentiably in its parameters.

Shape letters beyond the legend in `raywgen.weights`: R networks or windows that are written at once, Z values of a
state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raywgen.generators.common.writing import Rows
from raywgen.generators.lohp.policy import Policy
from raywgen.weights import Layout


def follow(policy: Policy, rows: Rows, layout: Layout, num_steps: int, temperature: float) -> Tensor:
    """Returns the states of some rows at the end of the path, `(R, Z)`.

    Args:
        policy: The policy.
        rows: Embedded conditions, noise and place of the rows.
        layout: Layout of their networks.
        num_steps: Number of evaluations, a multiple of the number of sub-trajectories.
        temperature: Scales the spread of the steps; 0 follows the mean.
    """
    path, net = policy.path, policy.forward_net
    x_RZ = rows.condition_embedding.new_zeros(len(rows.condition_embedding), rows.num_states)
    each = num_steps // path.num_targets
    for i in range(path.num_targets):
        start_RZ = x_RZ
        for n in range(each):
            step_1 = torch.tensor([i * path.length + n * path.length // each])
            x_R1Z = x_RZ.unsqueeze(1)
            ends_RZ = policy.ends(net, x_R1Z, step_1, rows.condition_embedding, layout, rows.place).squeeze(1)
            x_RZ = x_RZ + (ends_RZ - start_RZ) / each
            if temperature > 0:
                x_RZ = x_RZ + temperature * path.noise / each**0.5 * rows.noise.normal(x_RZ.shape[1])
    return x_RZ
