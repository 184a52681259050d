"""Makes the paths that the policy is trained on: its own rollouts, stored trajectories, and mixtures of both.

Any distribution of paths with full support may be used (Madan et al. 2022, arXiv 2209.12782), so a stored
sub-trajectory need not be likely under the policy. It is a Brownian bridge from its start to a draw around the local
target.

Here A counts sub-trajectories (one for each local target), L the steps of each, and D the values of a state.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from raywgen.generators.lohp.config import Hybrid, PathConfig
from raywgen.generators.lohp.kernels import sample_bridge
from raywgen.weights import KeyedNoise

Ends = Callable[[Tensor, int], Tensor]
"""Maps states `(B, D)` at a step of the whole path to the ends `(B, D)` of their sub-trajectory."""


@torch.no_grad()
def make_paths(
    ends: Ends,
    targets_BAD: Tensor,
    is_stored_BA: Tensor,
    noise: KeyedNoise,
    config: PathConfig,
    *,
    hybrid: Hybrid,
    exploration: float,
) -> Tensor:
    """Returns the states `(B, A, L + 1, D)` of every sub-trajectory, with its start and its end.

    Args:
        ends: The forward policy's prediction of ends.
        targets_BAD: Local targets.
        is_stored_BA: Which sub-trajectories lead to their local target instead of following the policy.
        noise: B rows of keyed noise.
        config: Settings of the path.
        hybrid: With `mixed`, a stored sub-trajectory starts at the previous local target; with `spliced`, at the
            current state of the path.
        exploration: Extra standard deviation of the policy's own steps, as a share of theirs.
    """
    _, k, D = targets_BAD.shape
    L, sigma = config.length, config.sigma
    state_BD = torch.zeros_like(targets_BAD[:, 0])
    parts = []
    for i in range(k):
        is_stored_B1 = is_stored_BA[:, i].unsqueeze(1)
        if hybrid == "mixed" and i > 0:
            state_BD = torch.where(is_stored_B1, targets_BAD[:, i - 1], state_BD)
        noise_BLD = noise.normal(L, D)
        rolled = [state_BD]
        if not bool(is_stored_B1.all()):
            for n in range(L):
                drift_BD = (ends(rolled[-1], i * L + n) - state_BD) / L
                rolled.append(rolled[-1] + drift_BD + (1 + exploration) * sigma * noise_BLD[:, n])
        end_BD = targets_BAD[:, i] + config.noise * noise_BLD[:, -1]
        stored_BLD = sample_bridge(state_BD, end_BD, L, sigma, noise_BLD[:, :-1])
        path_BLD = torch.stack(rolled, dim=1) if len(rolled) > 1 else stored_BLD
        path_BLD = torch.where(is_stored_B1.unsqueeze(2), stored_BLD, path_BLD)
        parts.append(path_BLD)
        state_BD = path_BLD[:, -1]
    return torch.stack(parts, dim=1)
