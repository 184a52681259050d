"""Copies chunks out of the packed form of many checkpoints at once, whatever their lengths, gaps and dtypes.

Shape letter beyond the legend in `raywgen.weights`: N pieces of chunks. Here B is the number of chunks, and P that of
the elements of a copied block.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from raywgen.corpus.chunk_map import ChunkMap, Pieces
from raywgen.corpus.shards import ShardView

# Floats of one byte have no indexing of their own in torch: elements are copied as integers of their size.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def copy_chunks(
    view: ShardView, chunks: ChunkMap, row_B: np.ndarray, chunk_B: np.ndarray, out_BK: Tensor
) -> np.ndarray:
    """Copies chunks of one shard as float32, with zeros beyond their lengths.

    Args:
        view: The shard.
        chunks: The chunks of its layout.
        row_B: The checkpoint of each chunk, ascending.
        chunk_B: The index of each chunk in its checkpoint.
        out_BK: Contiguous float32 tensor to write to.

    Returns:
        The length of each chunk.

    Raises:
        DamagedFileError: A checkpoint has changed since it was written.
    """
    pieces = chunks.pieces(chunk_B)
    for first, last, part_row_B, packed in view.parts(row_B):
        _copy(packed, view.row_bytes, part_row_B, pieces.of_items(first, last), chunks.dtypes, out_BK[first:last])
    length_B = chunks.lengths(chunk_B)
    # All short chunks are the last of their checkpoints, and so of one length.
    short_B = np.flatnonzero(length_B < chunks.chunk_length)
    if len(short_B):
        out_BK.numpy()[short_B, length_B[short_B[0]] :] = 0
    return length_B


def _copy(
    packed: Tensor,
    row_bytes: int,
    row_B: np.ndarray,
    pieces: Pieces,
    dtypes: tuple[torch.dtype, ...],
    out_BK: Tensor,
) -> None:
    """Copies all pieces from the packed forms of one record batch; float32 is the first of the dtypes."""
    for index, dtype in enumerate(dtypes):
        own = pieces if len(dtypes) == 1 else pieces.where(pieces.dtype_N == index)
        source = packed.view(_INTEGERS[dtype.itemsize])
        element_N = row_B[own.item_N] * (row_bytes // dtype.itemsize) + own.element_N
        if dtype == torch.float32 and len(left := _copy_heads(source, element_N, own, out_BK)) < len(element_N):
            own, element_N = own.where(left), element_N[left]
        if len(element_N):
            _copy_pieces(source.view(dtype), element_N, own, out_BK)


def _copy_heads(source: Tensor, element_N: np.ndarray, pieces: Pieces, out_BK: Tensor) -> np.ndarray:
    """Copies K elements from where each chunk begins, and past the end of its first piece; returns the pieces left.

    One copy of rows of equal length is the fastest, and most chunks are one piece. What it writes behind a first piece
    is overwritten later, so float32 must be the first of the dtypes.
    """
    num_rows, length = out_BK.shape
    is_head_N = (pieces.offset_N == 0) & (element_N <= len(source) - length)
    heads = np.flatnonzero(is_head_N)
    if 2 * len(heads) < num_rows:
        return np.arange(len(element_N))
    start_B = np.zeros(num_rows, dtype=np.int64)
    start_B[pieces.item_N[heads]] = element_N[heads]
    torch.index_select(_blocks(source.view(torch.float32), length), 0, torch.from_numpy(start_B), out=out_BK)
    return np.flatnonzero(~is_head_N)


def _copy_pieces(source: Tensor, element_N: np.ndarray, pieces: Pieces, out_BK: Tensor) -> None:
    length = out_BK.shape[1]
    out = out_BK.view(-1).numpy()
    integers = source.view(_INTEGERS[source.dtype.itemsize])
    place_N = pieces.item_N * length + pieces.offset_N
    for size, from_N, to_N in _equal_copies(element_N, place_N, pieces.length_N, length):
        copied_NP = _blocks(integers, size).index_select(0, torch.from_numpy(from_N)).view(source.dtype).float()
        # NumPy, because it writes rows of an overlapping view several times as fast as torch.
        np.lib.stride_tricks.as_strided(out, (len(out) - size + 1, size), out.strides * 2)[to_N] = copied_NP.numpy()


def _equal_copies(
    from_N: np.ndarray, to_N: np.ndarray, length_N: np.ndarray, full: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Splits copies of any lengths into groups of one size: yields the size, and where to copy from and to.

    The size of a piece is the greatest power of two that it holds: once from its beginning, once up to its end.
    """
    size_N = np.where(length_N == full, full, 1 << (np.frexp(length_N)[1] - 1).astype(np.int64))
    for size in np.unique(size_N).tolist():
        (of_size,) = np.nonzero(size_N == size)
        yield size, from_N[of_size], to_N[of_size]
        rest = length_N[of_size] - size
        if rest.any():
            again = of_size[rest > 0]
            shift = length_N[again] - size
            yield size, from_N[again] + shift, to_N[again] + shift


def _blocks(elements: Tensor, size: int) -> Tensor:
    """Returns a view whose row i begins at element i: selecting its rows copies blocks from any position."""
    return torch.as_strided(elements, (len(elements) - size + 1, size), (1, 1))
