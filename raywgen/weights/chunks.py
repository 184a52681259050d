"""Cuts the flat vector into chunks of fixed length, and computes features of each chunk's position.

Here W counts the chunks of a whole layout. Shape letter beyond the legend in `raywgen.weights`: G position features.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from raywgen.weights.layout import Layout
from raywgen.weights.tensors import KINDS, TensorSpec

_NUM_FREQUENCIES = 6


def num_chunks(layout: Layout, chunk_length: int) -> int:
    """Returns W, the number of chunks that cover a layout; the last one may be padded."""
    return -(-layout.num_values // chunk_length)


def to_chunks(values_BD: Tensor, chunk_length: int) -> Tensor:
    """Cuts flat vectors `(B, D)` into chunks `(B, W, K)`, zero-padded at the end."""
    padding = -values_BD.shape[-1] % chunk_length
    padded = torch.nn.functional.pad(values_BD, (0, padding))
    return padded.unflatten(-1, (padded.shape[-1] // chunk_length, chunk_length))


def from_chunks(chunks_BWK: Tensor, num_values: int) -> Tensor:
    """Joins chunks `(B, W, K)` to flat vectors `(B, D)`, dropping the padding."""
    return chunks_BWK.flatten(-2)[..., :num_values]


def chunk_mask(layout: Layout, chunk_length: int) -> Tensor:
    """Returns float32 `(W, K)`: 1 where a chunk holds a value, 0 where it is padding."""
    return to_chunks(torch.ones(1, layout.num_values), chunk_length)[0]


def num_position_features() -> int:
    """Returns G, the length of a row of `position_features`."""
    return 2 * _num_value_features()


@lru_cache(maxsize=256)
def position_features(layout: Layout, chunk_length: int) -> Tensor:
    """Returns features of each chunk's position in the network, float32 `(W, G)`.

    They describe the chunk's first and last value: kind of tensor, depth in the network, shape, and row, column and
    position in the whole network as sines and cosines. They follow from the layout alone, so layouts that were never
    seen in training have them too. Treat the result as read-only: it is shared between calls.
    """
    first = torch.arange(num_chunks(layout, chunk_length)) * chunk_length
    last = (first + chunk_length - 1).clamp(max=layout.num_values - 1)
    return span_features(layout, first, last)


def span_features(layout: Layout, first_W: Tensor, last_W: Tensor) -> Tensor:
    """Returns features `(W, G)` of spans, given the positions of their first and last value, int64 `(W,)`."""
    return torch.cat([_value_features(layout, first_W), _value_features(layout, last_W)], dim=1)


def _num_value_features() -> int:
    return len(KINDS) + 5 + 3 * 2 * _NUM_FREQUENCIES


def _value_features(layout: Layout, position_N: Tensor) -> Tensor:
    """Returns features `(N, G / 2)` of the values at N positions of the flat vector."""
    counts = torch.tensor([spec.num_values for spec in layout.generated])
    ends = counts.cumsum(0)
    tensor_N = torch.searchsorted(ends, position_N, right=True)
    matrices = torch.tensor([_matrix_shape(spec) for spec in layout.generated])
    num_rows_N, num_columns_N = matrices[tensor_N].unbind(1)
    inside_N = position_N - (ends - counts)[tensor_N]
    row_N = torch.div(inside_N, num_columns_N, rounding_mode="floor") / num_rows_N
    column_N = (inside_N % num_columns_N) / num_columns_N
    waves = [_waves(row_N), _waves(column_N), _waves(position_N / layout.num_values)]
    facts = torch.stack([_tensor_facts(layout, index) for index in range(len(layout.generated))])
    return torch.cat([facts[tensor_N], *waves], dim=1)


def _tensor_facts(layout: Layout, index: int) -> Tensor:
    """Returns the features that all values of a tensor share: kind, index, shape, number of tensors."""
    spec = layout.generated[index]
    num_rows, num_columns = _matrix_shape(spec)
    kind = torch.nn.functional.one_hot(torch.tensor(KINDS.index(spec.kind)), len(KINDS)).float()
    facts = torch.tensor(
        [
            index / max(1, len(layout.generated) - 1),
            math.log1p(num_rows) / 4,
            math.log1p(num_columns) / 4,
            math.log1p(spec.num_values) / 8,
            len(layout.generated) / 16,
        ]
    )
    return torch.cat([kind, facts])


def _matrix_shape(spec: TensorSpec) -> tuple[int, int]:
    num_rows = spec.shape[0] if len(spec.shape) > 1 else 1
    return max(1, num_rows), max(1, spec.num_values // max(1, num_rows))


def _waves(fraction_N: Tensor) -> Tensor:
    frequencies = math.pi * 2.0 ** torch.arange(_NUM_FREQUENCIES)
    angle = fraction_N.unsqueeze(1) * frequencies
    return torch.cat([angle.sin(), angle.cos()], dim=1)
