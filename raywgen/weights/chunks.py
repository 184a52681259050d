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
# Chunks whose features are held at once.
BLOCK = 1 << 14


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


def chunk_mask(
    layout: Layout, chunk_length: int, index_X: Tensor | None = None, device: torch.device | None = None
) -> Tensor:
    """Returns float32 `(X, K)`: 1 where a chunk holds a value, 0 where it is padding.

    Args:
        layout: The layout.
        chunk_length: K.
        index_X: The chunks, int64, in any shape; all of them by default.
        device: The device of the mask of all chunks; that of some chunks is where `index_X` is.
    """
    if index_X is None:
        return to_chunks(torch.ones(1, layout.num_values, device=device), chunk_length)[0]
    position_XK = index_X.unsqueeze(-1) * chunk_length + torch.arange(chunk_length, device=index_X.device)
    return (position_XK < layout.num_values).to(torch.float32)


def num_position_features() -> int:
    """Returns G, the length of a row of `position_features`."""
    return 2 * _num_value_features()


def position_features(layout: Layout, chunk_length: int, device: torch.device | None = None) -> Tensor:
    """Returns features of each chunk's position in the network, float32 `(W, G)`.

    They describe the chunk's first and last value: kind of tensor, depth in the network, shape, and row, column and
    position in the whole network as sines and cosines. They follow from the layout alone, so layouts that were never
    seen in training have them too. Treat the result as read-only: it is shared between calls.
    """
    return position_features_on(layout, chunk_length, device or torch.device("cpu"))


@lru_cache(maxsize=256)
def position_features_on(layout: Layout, chunk_length: int, device: torch.device) -> Tensor:
    """Returns `position_features` on a device; computed once."""
    return chunk_features(layout, chunk_length, torch.arange(num_chunks(layout, chunk_length))).to(device)


def chunk_features(layout: Layout, chunk_length: int, index_X: Tensor) -> Tensor:
    """Returns the rows `(X, G)` of `position_features` of some chunks, int64 of any shape.

    A chunk beyond the network's end, which holds nothing but padding, has the features of the last value.
    """
    first = (index_X * chunk_length).clamp(max=layout.num_values - 1)
    last = (first + chunk_length - 1).clamp(max=layout.num_values - 1)
    return span_features(layout, first, last)


@lru_cache(maxsize=256)
def mean_position_features(layout: Layout, chunk_length: int, device: torch.device | None = None) -> Tensor:
    """Returns the mean `(G,)` of the rows of `position_features`, in memory that does not grow with the network."""
    count = num_chunks(layout, chunk_length)
    if count <= BLOCK:
        return position_features(layout, chunk_length).mean(dim=0).to(device)
    total = torch.zeros(num_position_features(), dtype=torch.float64)
    for start in range(0, count, BLOCK):
        index_X = torch.arange(start, min(start + BLOCK, count))
        total += chunk_features(layout, chunk_length, index_X).sum(dim=0, dtype=torch.float64)
    return (total / count).float().to(device)


def span_features(layout: Layout, first_X: Tensor, last_X: Tensor) -> Tensor:
    """Returns features `(X, G)` of spans, given the positions of their first and last value, int64."""
    return torch.cat([_value_features(layout, first_X), _value_features(layout, last_X)], dim=-1)


def _num_value_features() -> int:
    return len(KINDS) + 5 + 3 * 2 * _NUM_FREQUENCIES


def _value_features(layout: Layout, position_X: Tensor) -> Tensor:
    """Returns features `(X, G / 2)` of the values at some positions of the flat vector."""
    ends, starts, matrices, facts = _tensor_table(layout, position_X.device)
    tensor_X = torch.searchsorted(ends, position_X, right=True)
    num_rows_X, num_columns_X = matrices[tensor_X].unbind(-1)
    inside_X = position_X - starts[tensor_X]
    row_X = torch.div(inside_X, num_columns_X, rounding_mode="floor") / num_rows_X
    column_X = (inside_X % num_columns_X) / num_columns_X
    waves = [_waves(row_X), _waves(column_X), _waves(position_X / layout.num_values)]
    return torch.cat([facts[tensor_X], *waves], dim=-1)


@lru_cache(maxsize=256)
def _tensor_table(layout: Layout, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns end and start in the flat vector, rows and columns, and features of each tensor of a layout."""
    counts = torch.tensor([spec.num_values for spec in layout.generated])
    ends = counts.cumsum(0)
    matrices = torch.tensor([_matrix_shape(spec) for spec in layout.generated])
    facts = torch.stack([_tensor_facts(layout, index) for index in range(len(layout.generated))])
    return ends.to(device), (ends - counts).to(device), matrices.to(device), facts.to(device)


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
            math.log1p(len(layout.generated)) / 4,
        ]
    )
    return torch.cat([kind, facts])


def _matrix_shape(spec: TensorSpec) -> tuple[int, int]:
    num_rows = spec.shape[0] if len(spec.shape) > 1 else 1
    return max(1, num_rows), max(1, spec.num_values // max(1, num_rows))


def _waves(fraction_X: Tensor) -> Tensor:
    frequencies = math.pi * 2.0 ** torch.arange(_NUM_FREQUENCIES, device=fraction_X.device)
    angle = fraction_X.unsqueeze(-1) * frequencies
    return torch.cat([angle.sin(), angle.cos()], dim=-1)
