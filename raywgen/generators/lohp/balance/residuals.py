"""The residuals of all sub-trajectories of a path, as differences of one potential per state.

A sub-trajectory from state m to state n > m is balanced where (Madan et al., arXiv 2209.12782, eq. 7; continuous
states as in arXiv 2402.05098)

    delta(m, n) = log F(s_m) + sum_{m <= j < n} log P_F(s_{j+1} | s_j)
                - log F(s_n) - sum_{m <= j < n} log P_B(s_j | s_{j+1})

vanishes. With

    g_t = log F(s_t) - sum_{j < t} (log P_F(s_{j+1} | s_j) - log P_B(s_j | s_{j+1}))

`delta(m, n) = g_m - g_n`: L + 1 numbers give the residuals of all L (L + 1) / 2 windows.

Here B counts paths and L steps (L + 1 states); `...` stands for coordinates, each with a residual of its own. Where
flow and both kernels factor over coordinates, the whole residual is their sum, and vanishes if each of them does.
"""

from __future__ import annotations

import torch
from torch import Tensor


def potentials(log_flow: Tensor, log_forward: Tensor, log_backward: Tensor) -> Tensor:
    """Returns `g`, `(B, L + 1, ...)`.

    Args:
        log_flow: `log F(s_t)`, `(B, L + 1, ...)`.
        log_forward: `log P_F(s_{t+1} | s_t)`, `(B, L, ...)`.
        log_backward: `log P_B(s_t | s_{t+1})`, `(B, L, ...)`.
    """
    B, states, *trailing = log_flow.shape
    assert log_forward.shape == log_backward.shape == (B, states - 1, *trailing)
    gained = (log_forward - log_backward).cumsum(dim=1)
    return log_flow - torch.cat([torch.zeros_like(log_flow[:, :1]), gained], dim=1)
