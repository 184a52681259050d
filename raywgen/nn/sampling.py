"""Truncation and guidance of the distribution that tokens are drawn from.

Shape letters beyond the legend in `raywgen.weights`: X positions in any shape.
"""

from __future__ import annotations

import torch
from torch import Tensor


def truncated(log_p_XV: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Log-weights with all but the likeliest codes at minus infinity; what is left is not normalised again.

    Args:
        log_p_XV: Log-weights of the codes, normalised or not.
        top_k: Codes that are kept (Fan et al. 2018); 0 keeps all.
        top_p: The likeliest codes are kept until together they hold this probability among those that `top_k` left
            (nucleus sampling, Holtzman et al. 2020); at least one is.
    """
    num_codes = log_p_XV.shape[-1]
    if 0 < top_k < num_codes:
        # By index, not by value, so that ties leave exactly `top_k`.
        kept = log_p_XV.topk(top_k, dim=-1).indices
        log_p_XV = torch.full_like(log_p_XV, -torch.inf).scatter(-1, kept, log_p_XV.gather(-1, kept))
    if top_p < 1:
        sorted_XV, order = log_p_XV.sort(dim=-1, descending=True)
        p_XV = sorted_XV.softmax(dim=-1)
        before_XV = p_XV.cumsum(dim=-1) - p_XV
        before_XV[..., 0] = -1.0  # Rounding must not drop the likeliest.
        kept_XV = sorted_XV.masked_fill(before_XV >= top_p, -torch.inf)
        log_p_XV = torch.empty_like(log_p_XV).scatter(-1, order, kept_XV)
    return log_p_XV


def guided(log_p_XV: Tensor, unconditional_XV: Tensor, guidance: float) -> Tensor:
    """`log p_u + g * (log p_c - log p_u)`: classifier-free guidance (Ho and Salimans 2021, eq. 6; g = 1 + w there).

    Args:
        log_p_XV: Log-probabilities with the condition.
        unconditional_XV: Log-probabilities without it.
        guidance: g; 0 ignores the condition, 1 is plain sampling, above 1 exaggerates what the condition changes.
    """
    return unconditional_XV + guidance * (log_p_XV - unconditional_XV)
