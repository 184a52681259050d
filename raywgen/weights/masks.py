"""Tensors that hold infinities by design, such as causal masks, told apart from weights that diverged.

Shape legend: N networks, X values of a tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Attention masks hold -1e4 where half precision has to hold them, else -1e9, the least float, or minus infinity.
_LEAST_MASKED = -1e4
_LEARNED = ("running_mean", "running_var")


def may_be_mask(name: str) -> bool:
    """Whether a tensor of this name may hold a mask; what common layers call a parameter may not."""
    leaf = name.rpartition(".")[2]
    return leaf != "bias" and "weight" not in leaf and leaf not in _LEARNED


def masks(values_NX: Tensor) -> Tensor:
    """Which networks' tensors are masks, bool `(N,)`.

    A mask holds one value of at most -1e4, and beside it at most zeros, or at most ones.

    Args:
        values_NX: Real values of one tensor in N networks, float32 or float64.
    """
    if not values_NX.shape[1]:
        return torch.zeros(len(values_NX), dtype=torch.bool)
    least_N1, most_N1 = values_NX.amin(dim=1, keepdim=True), values_NX.amax(dim=1, keepdim=True)
    # NaN is neither the least nor the greatest value.
    of_two_N = ((values_NX == least_N1) | (values_NX == most_N1)).all(dim=1)
    others_N1 = (most_N1 == least_N1) | (most_N1 == 0) | (most_N1 == 1)
    return of_two_N & ((least_N1 <= _LEAST_MASKED) & others_N1).squeeze(1)


def alike(values_NX: Tensor) -> bool:
    """Whether several networks hold the same several values, without NaN: a table that nobody trained."""
    num, length = values_NX.shape
    return num > 1 and length > 1 and bool((values_NX == values_NX[:1]).all())
