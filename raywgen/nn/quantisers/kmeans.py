"""Nearest code vectors and k-means.

Shape legend: N vectors, V codes, K values of a vector, X any leading dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raywgen.nn.passes import rows_of_a_pass
from raywgen.nn.precision import autocast

# The scores of a pass over vectors stay in a core's cache; on other devices they need only fit into memory.
_CPU_SCORES_OF_A_PASS = 1 << 17
_SCORES_OF_A_PASS = 1 << 27
# A product over more values is summed in several parts, and a number that is added in it is rounded otherwise.
_MOST_VALUES_OF_A_SUM = 128
# A product of fewer rows is rounded unlike that of many.
_FEWEST_ROWS = 8


@torch.no_grad()
def nearest_code(vectors_NK: Tensor, codebook_VK: Tensor, mask_NK: Tensor | None = None) -> Tensor:
    """Returns the index of the nearest code vector, int64 `(N,)`, over real values only; the first of equally near."""
    if vectors_NK.device.type != "cpu" or vectors_NK.dtype != torch.float32 or len(vectors_NK) < _FEWEST_ROWS:
        return _nearest_by_argmax(vectors_NK, codebook_VK, mask_NK, _SCORES_OF_A_PASS)
    code_N = _nearest_by_maximum(vectors_NK, codebook_VK, half_squares(codebook_VK, mask_NK is not None))
    is_undecided_N = (code_N < 0) | (code_N >= len(codebook_VK))
    if mask_NK is not None and bool(mask_NK.amin() <= 0):
        is_undecided_N |= (mask_NK <= 0).any(dim=1)
    undecided_J = is_undecided_N.nonzero().flatten()
    if 0 < len(undecided_J) < _FEWEST_ROWS:
        undecided_J = undecided_J.repeat(_FEWEST_ROWS)
    if len(undecided_J) > 0:
        mask_JK = None if mask_NK is None else mask_NK[undecided_J]
        code_N[undecided_J] = _nearest_by_argmax(vectors_NK[undecided_J], codebook_VK, mask_JK, _CPU_SCORES_OF_A_PASS)
    return code_N


def _nearest_by_argmax(vectors_NK: Tensor, codebook_VK: Tensor, mask_NK: Tensor | None, num_scores: int) -> Tensor:
    rows = rows_of_a_pass(len(vectors_NK), len(codebook_VK), num_scores)
    parts = vectors_NK.split(rows)
    masks = [None] * len(parts) if mask_NK is None else mask_NK.split(rows)
    gains = (code_gain(part_NK, codebook_VK, real_NK) for part_NK, real_NK in zip(parts, masks, strict=True))
    return torch.cat([gain_NV.argmax(dim=1) for gain_NV in gains])


def _nearest_by_maximum(vectors_NK: Tensor, codebook_VK: Tensor, half_square_V: Tensor) -> Tensor:
    """Returns the nearest codes of vectors without padding; a number outside 0 to V - 1 where several are nearest.

    On a CPU `argmax` compares one number after another, and takes twice as long as the product. So the maximum of each
    row marks its column with a one, and a second product gives the column's number, plus V for each one.
    """
    (N, K), V = vectors_NK.shape, len(codebook_VK)
    num_parts = -(-N // rows_of_a_pass(N, V, _CPU_SCORES_OF_A_PASS))
    rows = -(-N // num_parts)
    score_RV, best_R1 = vectors_NK.new_empty(rows, V), vectors_NK.new_empty(rows, 1)
    number_V, number_N = torch.arange(V, 2 * V, dtype=torch.float32), vectors_NK.new_empty(N)
    code_KV = codebook_VK.t()
    with autocast("fp32"):
        # The parts are of even length, so that none has a few rows alone.
        parts = zip(vectors_NK.tensor_split(num_parts), number_N.tensor_split(num_parts), strict=True)
        for part_RK, number_R in parts:
            if len(part_RK) < len(score_RV):
                score_RV, best_R1 = score_RV[: len(part_RK)], best_R1[: len(part_RK)]
            if K <= _MOST_VALUES_OF_A_SUM:
                torch.addmm(half_square_V, part_RK, code_KV, beta=-1, out=score_RV)
            else:
                torch.mm(part_RK, code_KV, out=score_RV).sub_(half_square_V)
            torch.amax(score_RV, dim=1, keepdim=True, out=best_R1)
            torch.mv(score_RV.eq_(best_R1), number_V, out=number_R)
    return number_N.long().sub_(V)


def half_squares(codebook_VK: Tensor, is_masked: bool) -> Tensor:
    """Returns `|c|^2 / 2` of every code `(V,)`, rounded as in `code_gain` with and without a mask."""
    half_square_VK = 0.5 * codebook_VK.square()
    if not is_masked:
        return half_square_VK.sum(dim=1)
    with autocast("fp32", codebook_VK.device.type):
        return (torch.ones_like(codebook_VK[:1]).expand(_FEWEST_ROWS, -1) @ half_square_VK.t())[0]


def code_gain(vectors_XK: Tensor, codebook_VK: Tensor, mask_XK: Tensor | None) -> Tensor:
    """Returns `(|x|^2 - |x - c|^2) / 2` for every code, `(..., V)`."""
    half_square_VK = 0.5 * codebook_VK.square()
    # In bfloat16, which only training uses, a code that is not the nearest would be chosen now and then.
    with autocast("fp32", vectors_XK.device.type):
        if mask_XK is None:
            return (vectors_XK @ codebook_VK.t()).sub_(half_square_VK.sum(dim=1))
        return ((vectors_XK * mask_XK) @ codebook_VK.t()).sub_(mask_XK @ half_square_VK.t())


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
