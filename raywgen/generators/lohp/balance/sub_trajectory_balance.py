"""Sub-trajectory balance, SubTB(lambda) (Madan et al., arXiv 2209.12782, eq. 9), at the cost of a matrix product.

    L_SubTB = sum_{m < n} lam^(n - m) (g_m - g_n)^2 / sum_{m < n} lam^(n - m)

over windows up to a greatest length. With `W_mn = lam^|m - n|`, zero on the diagonal and beyond that length, the sum
is the quadratic form of the graph Laplacian of W:

    sum_{m < n} W_mn (g_m - g_n)^2 = g^T (diag(W 1) - W) g

so no tensor holds pairs of states of each path. A constant added to g does not change the form, but it does increase
rounding errors, so g is centred over time first.

Small lam, or a greatest length of 1, is detailed balance; large lam tends to trajectory balance.

Here B counts paths, L steps and S = L + 1 states; `...` stands for coordinates.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sub_trajectory_balance_loss(g: Tensor, lam: float, max_length: int | None = None) -> Tensor:
    """Returns the weighted mean of the squared residuals of all windows, a scalar.

    Args:
        g: Potentials, `(B, L + 1, ...)`.
        lam: Geometric weight of a longer window.
        max_length: Length of the longest window; all windows by default.

    Raises:
        ValueError: As in `window_weights`.
    """
    W_SS = window_weights(g.shape[1] - 1, lam, max_length).to(g)
    laplacian_SS = W_SS.sum(dim=1).diag() - W_SS
    centred = g - g.mean(dim=1, keepdim=True)
    # All dimensions but time are treated as samples.
    centred_SN = centred.transpose(0, 1).flatten(start_dim=1)
    return (centred_SN * (laplacian_SS @ centred_SN)).sum() / centred_SN.shape[1]


def window_weights(length: int, lam: float, max_length: int | None = None) -> Tensor:
    """Returns `W`, symmetric float64 `(L + 1, L + 1)`; the part above its diagonal sums to 1.

    Args:
        length: L.
        lam: Geometric weight of a longer window.
        max_length: Length of the longest window; all windows by default.

    Raises:
        ValueError: lam is not a positive number, or no window is left.
    """
    assert length >= 1, length
    if not 0 < lam < math.inf:
        raise ValueError(f"lam={lam}: give a number above 0; small ones favour short windows, large ones long ones")
    if max_length is not None and max_length < 1:
        raise ValueError(
            f"max_length={max_length}: give at least 1, which is detailed balance, or None for all windows"
        )
    longest = length if max_length is None else min(length, max_length)
    states_S = torch.arange(length + 1)
    lengths_SS = (states_S.unsqueeze(1) - states_S).abs()
    # Relative to the heaviest window: powers of large lam would overflow.
    exponents_SS = lengths_SS.double() * math.log(lam)
    heaviest = max(math.log(lam), longest * math.log(lam))
    is_window_SS = (lengths_SS >= 1) & (lengths_SS <= longest)
    W_SS = (exponents_SS - heaviest).masked_fill(~is_window_SS, -math.inf).exp()
    return 2 * W_SS / W_SS.sum()
