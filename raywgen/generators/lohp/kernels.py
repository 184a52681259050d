"""Gaussian kernels of paths of vectors: a forward step with drift, and a backward step of the bridge to the start.

    P_F(s_{n+1} | s_n) = N(s_n + drift, sigma^2)
    P_B(s_n | s_{n+1}) = N(start + (s_{n+1} - start) n / (n + 1), sigma^2 n / (n + 1))

P_B is the backward kernel of a Brownian motion that began at `start` n + 1 steps ago, whatever its constant drift. The
state at n = 0 is the start with certainty, so its log probability is zero. Log densities are given per coordinate.

Here B counts paths, L steps of a path with L + 1 states, and `...` stands for any leading dimensions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


def forward_log_prob(x_next: Tensor, x: Tensor, drift: Tensor, sigma: float | Tensor) -> Tensor:
    """Returns `log N(x_next; x + drift, sigma^2)` of each coordinate, `(..., D)`.

    Args:
        x_next: State after the step.
        x: State before it.
        drift: Mean step.
        sigma: Standard deviation of the step; a tensor broadcasts.
    """
    return _log_normal(x_next - x - drift, sigma)


def bridge_log_prob(x: Tensor, x_next: Tensor, start: Tensor, n: int | Tensor, sigma: float | Tensor) -> Tensor:
    """Returns the log density of each coordinate of the step back from state n + 1 to n, `(..., D)`; zero for n = 0.

    Args:
        x: State n.
        x_next: State n + 1.
        start: State 0.
        n: Steps from the start to `x`; a tensor broadcasts to the shape of `x`, so `(L, 1)` for steps in the dimension
            before the last.
        sigma: Standard deviation of one forward step.
    """
    n = torch.as_tensor(n, device=x.device)
    # At n = 0 any positive spread will do: the result is masked below, and the gradient must not be 0 / 0.
    steps = n.clamp(min=1).to(x.dtype)
    share = steps / (steps + 1)
    log_prob = _log_normal(x - start - (x_next - start) * share, sigma * share.sqrt())
    return torch.where(n > 0, log_prob, torch.zeros_like(log_prob))


def sample_bridge(start_BD: Tensor, end_BD: Tensor, length: int, sigma: float | Tensor, noise_BLD: Tensor) -> Tensor:
    """Draws the states of Brownian bridges from start to end, both included, `(B, L + 1, D)`.

    By the bridge kernel above, `y_n = (s_n - start) / n` is a cumulative sum, which needs no loop over steps:
    `y_n = y_{n+1} + sigma / sqrt(n (n + 1)) noise_n`.

    Args:
        start_BD: First states.
        end_BD: Last states.
        length: L.
        sigma: Standard deviation of one step; a tensor broadcasts over paths.
        noise_BLD: Standard normal noise `(B, L - 1, D)`, one row for every inner state.
    """
    assert noise_BLD.shape == (len(end_BD), length - 1, end_BD.shape[-1]), noise_BLD.shape
    n_L1 = torch.arange(1, length, dtype=end_BD.dtype, device=end_BD.device).unsqueeze(-1)
    steps_BLD = sigma / (n_L1 * (n_L1 + 1)).sqrt() * noise_BLD
    y_BLD = ((end_BD - start_BD) / length).unsqueeze(1) + steps_BLD.flip(1).cumsum(1).flip(1)
    between_BLD = start_BD.unsqueeze(1) + n_L1 * y_BLD
    return torch.cat([start_BD.unsqueeze(1), between_BLD, end_BD.unsqueeze(1)], dim=1)


def _log_normal(error: Tensor, sigma: float | Tensor) -> Tensor:
    log_sigma = sigma.log() if isinstance(sigma, Tensor) else math.log(sigma)
    return -0.5 * (error / sigma).square() - log_sigma - _HALF_LOG_TWO_PI
