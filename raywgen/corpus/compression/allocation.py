"""The allocation of bits to kernels: more where weights are large.

A kernel (all values between one input and one output channel) is divided by `row scale * column scale`, two tokens that
are stored. Independent Gaussians of variances v_i cost the least squared error where value i gets
`R + log2(v_i / geometric mean) / 2` bits (reverse water-filling; Cover and Thomas 2006, theorem 10.3.3). Here

    bits = round(log2(row * column / rms of the tensor) + log2(weight of the tensor) / 2 - threshold), at least 0

which a decoder knows from the stored scales, the layout and one threshold. Where all values count equally the weight is
1. But what a layer adds to a network's output depends on its own noise to signal, not on its size: where all tensors
count equally it is one over the number of values.

Shape letters beyond the legend in `raywgen.weights`: G row scales, I column scales, P kernels of all large tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from raywgen.corpus.compression.config import CountEqually
from raywgen.corpus.compression.scalars import decode_columns, decode_scales, encode_columns, encode_scales
from raywgen.weights import TensorSpec

MAX_BITS = 8
_THRESHOLD_STEPS = 256
_FIT_ROUNDS = 3
_LOWEST, _HIGHEST = -(MAX_BITS + 16) * _THRESHOLD_STEPS, 16 * _THRESHOLD_STEPS


def kernel_sizes(large: Sequence[TensorSpec]) -> Tensor:
    """Returns the number of values of each kernel of some tensors, int64 `(P,)`."""
    sizes = [
        torch.full((spec.shape[0] * spec.shape[1],), spec.num_values // (spec.shape[0] * spec.shape[1]))
        for spec in large
    ]
    return torch.cat(sizes) if sizes else torch.zeros(0, dtype=torch.int64)


def fit_scales(spec: TensorSpec, tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Finds row and column tokens whose product comes near the kernels' root mean squares, by alternating means."""
    power_GI = tensor.double().reshape(spec.shape[0], spec.shape[1], -1).square().mean(dim=2)
    columns_I = torch.zeros(power_GI.shape[1], dtype=torch.int64)
    column_power_I = torch.ones(power_GI.shape[1], dtype=torch.float64)
    for _ in range(_FIT_ROUNDS):
        rows_G = encode_scales((power_GI / column_power_I).mean(dim=1).sqrt())
        row_power_G1 = decode_scales(rows_G).double().square().unsqueeze(1)
        columns_I = encode_columns((power_GI / row_power_G1).mean(dim=0).sqrt())
        column_power_I = decode_columns(columns_I).double().square()
    return encode_scales((power_GI / column_power_I).mean(dim=1).sqrt()), columns_I


def bits_of_kernels(
    large: Sequence[TensorSpec], rows_G: Tensor, columns_I: Tensor, threshold: int, count_equally: CountEqually
) -> tuple[Tensor, Tensor]:
    """Returns the bits of a value int64 `(P,)` and its scale float32 `(P,)`, by kernel.

    Args:
        large: The tensors.
        rows_G: Row tokens of all of them.
        columns_I: Column tokens of all of them.
        threshold: The threshold of the allocation, in 1/256 octaves.
        count_equally: The things whose errors count equally: `tensors` or `values`.
    """
    rows = rows_G.split([spec.shape[0] for spec in large])
    columns = columns_I.split([spec.shape[1] for spec in large])
    widths, scales = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0)]
    for spec, row_tokens_G, column_tokens_I in zip(large, rows, columns, strict=True):
        weight = 1 / spec.num_values if count_equally == "tensors" else 1.0
        scale_GI = decode_scales(row_tokens_G).double().unsqueeze(1) * decode_columns(column_tokens_I).double()
        octave_GI = scale_GI.log2() - scale_GI.square().mean().sqrt().log2() + math.log2(weight) / 2
        bits_GI = torch.round(octave_GI - threshold / _THRESHOLD_STEPS)
        widths.append(bits_GI.clamp(0, MAX_BITS).long().flatten())
        scales.append(scale_GI.float().flatten())
    return torch.cat(widths), torch.cat(scales)


def padded_bits(widths_P: Tensor, sizes_P: Tensor, vector_length: int) -> int:
    """Returns the number of bits of all vectors; the last vector of each width is padded."""
    counts = torch.bincount(widths_P, weights=sizes_P.double(), minlength=MAX_BITS + 1).long()
    return sum(bits * vector_length * -(-int(counts[bits]) // vector_length) for bits in range(1, MAX_BITS + 1))


def lowest_threshold(num_bits: Callable[[int], int], budget: float) -> int | None:
    """Searches the lowest threshold that keeps the budget; None where the highest one does not."""
    low, high = _LOWEST, _HIGHEST
    if num_bits(high) > budget:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if num_bits(middle) <= budget else (middle, high)
    return high
