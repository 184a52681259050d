"""Noise schedules of short chains, and the local chains within them (Mc-Di, arXiv 2502.01117, section 3.2).

Time runs in the order of generation, from noise (t = 0) to weights (t = T). Step j multiplies the signal by
`1 / sqrt(alpha_j)`, so j = 0 is the noisiest step. With k local targets the i-th chain ends at step `i T / k`
(rounded where k does not divide T):

    abar_t   = prod_{j=t}^{T-1} alpha_j           the global chain
    abar_t^i = prod_{j=t}^{i T / k - 1} alpha_j   the i-th local chain, t < i T / k

The paper does not give its betas. The usual betas of long chains (1e-4 to 0.02) would leave a signal of 0.82 in the
first state of 20 steps. Here every schedule starts at nearly pure noise, whatever T is.

Here T counts the steps of a chain, and B samples of it.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Self

import torch
from torch import Tensor

ScheduleKind = Literal["cosine", "linear"]
# The signal that one step may remove at most. Smaller would amplify what a noise prediction gets wrong in the first
# step by more than 7; larger would leave more than a hundredth of the signal in the first state of 20 steps.
_SMALLEST_ALPHA = 0.02


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Schedule:
    """One chain of T steps with k local chains in it.

    Attributes:
        abar_T: float64 `(T + 1,)`; `abar_T[t]` is the global signal at t, and 1 at T.
        ends: The step at which each local chain ends, ascending; the last is T.
    """

    abar_T: Tensor
    ends: tuple[int, ...]

    @classmethod
    @lru_cache(maxsize=64)
    def make(cls, kind: ScheduleKind, num_steps: int, num_targets: int) -> Self:
        """Makes a schedule.

        Args:
            kind: `cosine` (Nichol and Dhariwal 2021, eq. 17, without offset), or `linear` (betas from 1e-4 to 0.02,
                rescaled by 1000 / T).
            num_steps: T.
            num_targets: k, at most T.

        Raises:
            ValueError: k does not lie between 1 and T.
        """
        if not 1 <= num_targets <= num_steps:
            raise ValueError(f"num_targets={num_targets}: must lie between 1 and num_steps={num_steps}")
        alphas_T = _cosine(num_steps) if kind == "cosine" else _linear(num_steps)
        products_T = alphas_T.clamp(min=_SMALLEST_ALPHA).flip(0).cumprod(0).flip(0)
        ends = tuple(round(i * num_steps / num_targets) for i in range(1, num_targets + 1))
        return cls(abar_T=torch.cat([products_T, torch.ones(1, dtype=torch.float64)]), ends=ends)

    @property
    def num_steps(self) -> int:
        """Returns T, the number of steps."""
        return len(self.abar_T) - 1

    def signal(self, t_B: Tensor, end_B: Tensor | int | None = None) -> Tensor:
        """Returns `prod_{j=t}^{end-1} alpha_j`, float32 `(B,)`; by default to the end of the global chain."""
        abar_B = self.abar_T[t_B]
        return (abar_B if end_B is None else abar_B / self.abar_T[end_B]).float()

    def steps(self, num_steps: int, key: str = "sampling.num_steps") -> list[tuple[int, int]]:
        """Lists the begin and end of each of `num_steps` sampling steps, evenly spread over the chain.

        Args:
            num_steps: Number of sampling steps.
            key: The setting that gives it, for the error.

        Raises:
            ValueError: The chain has fewer steps.
        """
        if not 1 <= num_steps <= self.num_steps:
            raise ValueError(f"{key}={num_steps}: must lie between 1 and diffusion.num_steps={self.num_steps}")
        stops = [round(s * self.num_steps / num_steps) for s in range(num_steps + 1)]
        return list(itertools.pairwise(stops))


def _cosine(num_steps: int) -> Tensor:
    signal_T = torch.linspace(math.pi / 2, 0, num_steps + 1, dtype=torch.float64).cos().square()
    return signal_T[:-1] / signal_T[1:]


def _linear(num_steps: int) -> Tensor:
    betas_T = torch.linspace(0.02, 1e-4, num_steps, dtype=torch.float64) * (1000 / num_steps)
    return 1 - betas_T.clamp(max=1 - _SMALLEST_ALPHA)
