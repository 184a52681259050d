"""Detailed balance: every single step balances (Bengio et al., arXiv 2111.09266, section 3.2).

    L_DB = mean_t (g_t - g_{t+1})^2

Here B counts paths and L steps; `...` stands for coordinates.
"""

from __future__ import annotations

from torch import Tensor


def detailed_balance_loss(g: Tensor) -> Tensor:
    """Returns the mean squared residual of the windows of length 1, a scalar.

    Args:
        g: Potentials, `(B, L + 1, ...)`.
    """
    return g.diff(dim=1).square().mean()
