"""Draws which paths of a batch are off-policy ones, that is, stored.

    L = (1 - mix) E_on[L_balance] + mix E_off[L_balance]

Each path is a stored one with probability `mix`. So the plain mean of any balance loss over all paths has this
expectation, however a batch is split over workers.

Here A counts sub-trajectories.
"""

from __future__ import annotations

from torch import Tensor

from raywgen.generators.lohp.config import Hybrid
from raywgen.weights import KeyedNoise


def draw_stored(noise: KeyedNoise, num: int, mix: float, hybrid: Hybrid) -> Tensor:
    """Draws which sub-trajectories are stored ones, bool `(B, k)`.

    Args:
        noise: B rows of keyed noise.
        num: A.
        mix: Probability of a stored one.
        hybrid: `mixed` for whole paths, `spliced` for each sub-trajectory by itself.
    """
    drawn = noise.uniform(1 if hybrid == "mixed" else num) < mix
    return drawn.expand(-1, num)
