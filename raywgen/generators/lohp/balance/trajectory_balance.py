"""Trajectory balance: the path as a whole balances (Malkin et al., arXiv 2201.13259, eq. 14).

    L_TB = (g_0 - g_L)^2

Here B counts paths and L steps; `...` stands for coordinates.
"""

from __future__ import annotations

from torch import Tensor


def trajectory_balance_loss(g: Tensor) -> Tensor:
    """Returns the mean squared residual of the window from the first state to the last, a scalar.

    Args:
        g: Potentials, `(B, L + 1, ...)`; those between the first and the last do not matter.
    """
    return (g[:, 0] - g[:, -1]).square().mean()
