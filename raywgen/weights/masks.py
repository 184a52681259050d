"""Distinguishes tensors that hold infinities by design, such as causal masks, from weights that diverged."""

from __future__ import annotations

import torch
from torch import Tensor

# Attention masks hold -1e4 for half precision, otherwise -1e9, the least float, or minus infinity.
_LEAST_MASKED = -1e4
_LEARNED = ("running_mean", "running_var")


def may_be_mask(name: str) -> bool:
    """Whether a tensor of this name may hold a mask; the parameter names of common layers are excluded."""
    leaf = name.rpartition(".")[2]
    return leaf != "bias" and "weight" not in leaf and leaf not in _LEARNED


def masks(values_NX: Tensor) -> Tensor:
    """Returns in which networks a tensor is a mask, bool `(N,)`.

    A mask holds one value of at most -1e4, and beside it at most zeros, or at most ones.

    Args:
        values_NX: Real values of the tensor in N networks, float32 or float64.
    """
    if not values_NX.shape[1]:
        return torch.zeros(len(values_NX), dtype=torch.bool)
    least_N1, most_N1 = values_NX.amin(dim=1, keepdim=True), values_NX.amax(dim=1, keepdim=True)
    # NaN is neither the least nor the greatest value.
    of_two_N = ((values_NX == least_N1) | (values_NX == most_N1)).all(dim=1)
    others_N1 = (most_N1 == least_N1) | (most_N1 == 0) | (most_N1 == 1)
    return of_two_N & ((least_N1 <= _LEAST_MASKED) & others_N1).squeeze(1)


def alike(values_NX: Tensor) -> bool:
    """Whether all of several networks hold equal values without NaN, as a table that is not trained does."""
    num, length = values_NX.shape
    return num > 1 and length > 1 and bool((values_NX == values_NX[:1]).all())
