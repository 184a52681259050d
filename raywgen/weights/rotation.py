"""Random rotations that make heavy-tailed values Gaussian, keyed so that nothing has to be stored.

A rotation multiplies by random signs and applies a Walsh-Hadamard transform. It is orthogonal, so squared errors do not
change (Tseng et al. 2024, "QuIP#", section 3, incoherence processing). Here K is the number of values of a row.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from raywgen.weights.errors import WeightsError
from raywgen.weights.noise import KeyedNoise


def rotate(rows_NK: Tensor, key: int) -> Tensor:
    """Rotates rows `(N, K)`, each with signs of its own.

    Args:
        rows_NK: Float32; K is a power of two.
        key: Key of the signs; equal keys give equal rotations.

    Raises:
        WeightsError: K is not a power of two.
    """
    return (rows_NK * _signs(rows_NK, key)) @ hadamard(rows_NK.shape[1]).to(rows_NK.device)


def rotate_back(rows_NK: Tensor, key: int) -> Tensor:
    """Reverts `rotate` with the same key."""
    return (rows_NK @ hadamard(rows_NK.shape[1]).to(rows_NK.device)) * _signs(rows_NK, key)


@lru_cache(maxsize=8)
def hadamard(size: int) -> Tensor:
    """Returns the symmetric orthogonal Walsh-Hadamard matrix, float32 `(size, size)`; treat it as read-only."""
    if size < 1 or size & (size - 1):
        raise WeightsError(f"rows of {size} values cannot be rotated; give a power of two")
    matrix = torch.ones(1, 1)
    for _ in range(size.bit_length() - 1):
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    return matrix / size**0.5


def _signs(rows_NK: Tensor, key: int) -> Tensor:
    noise = KeyedNoise(key, torch.arange(len(rows_NK), device=rows_NK.device))
    return noise.integers(2, rows_NK.shape[1]).float() * 2 - 1
