"""Nearest code vectors and k-means.

Shape legend: N vectors, V codes, K values of a vector, X any leading dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raywgen.nn.precision import autocast

# The scores of a pass over vectors stay in a core's cache; on other devices they need only fit into memory.
_CPU_SCORES_OF_A_PASS = 1 << 18
_SCORES_OF_A_PASS = 1 << 27


def nearest_code(vectors_NK: Tensor, codebook_VK: Tensor, mask_NK: Tensor | None = None) -> Tensor:
    """Returns the index of the nearest code vector, int64 `(N,)`, over real values only."""
    most = _CPU_SCORES_OF_A_PASS if vectors_NK.device.type == "cpu" else _SCORES_OF_A_PASS
    rows = max(1, most // len(codebook_VK))
    parts = vectors_NK.split(rows)
    masks = [None] * len(parts) if mask_NK is None else mask_NK.split(rows)
    gains = (code_gain(part_NK, codebook_VK, real_NK) for part_NK, real_NK in zip(parts, masks, strict=True))
    return torch.cat([gain_NV.argmax(dim=1) for gain_NV in gains])


def code_gain(vectors_XK: Tensor, codebook_VK: Tensor, mask_XK: Tensor | None) -> Tensor:
    """Returns `(|x|^2 - |x - c|^2) / 2` for every code, `(..., V)`."""
    half_square_VK = 0.5 * codebook_VK.square()
    # In bfloat16, which only training uses, a code that is not the nearest would be chosen now and then.
    with autocast("fp32", vectors_XK.device.type):
        if mask_XK is None:
            return vectors_XK @ codebook_VK.t() - half_square_VK.sum(dim=1)
        return (vectors_XK * mask_XK) @ codebook_VK.t() - mask_XK @ half_square_VK.t()


def whole_vectors(vectors_NK: Tensor, mask_NK: Tensor | None) -> Tensor:
    """Returns the vectors that have no padding; if all have some, all of them with zeros for it."""
    if mask_NK is None:
        return vectors_NK
    is_whole_N = (mask_NK > 0).all(dim=1)
    return vectors_NK[is_whole_N] if bool(is_whole_N.any()) else vectors_NK * mask_NK


def kmeans(vectors_NK: Tensor, num_codes: int, num_iterations: int, generator: torch.Generator) -> Tensor:
    """Returns codes `(V, K)` by Lloyd's algorithm from random vectors; an empty code restarts on one of them."""
    pick = torch.randint(len(vectors_NK), (num_codes,), generator=generator).to(vectors_NK.device)
    codebook_VK = vectors_NK[pick].clone()
    for _ in range(num_iterations):
        code_N = nearest_code(vectors_NK, codebook_VK)
        counts_V = torch.bincount(code_N, minlength=num_codes)
        sums_VK = torch.zeros_like(codebook_VK).index_add_(0, code_N, vectors_NK)
        used = counts_V > 0
        codebook_VK[used] = sums_VK[used] / counts_V[used].unsqueeze(1)
        if bool((~used).any()):
            fresh = torch.randint(len(vectors_NK), (int((~used).sum()),), generator=generator)
            codebook_VK[~used] = vectors_NK[fresh.to(vectors_NK.device)]
    return codebook_VK
