"""Maps chunks of the flat vector to the elements of a checkpoint's packed form.

Shape letters beyond the legend in `raywgen.weights`: R runs of a layout, N pieces of a batch of chunks. Here B is the
number of chunks of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from raywgen.weights import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """The contiguous pieces of a batch of chunks: each lies in one run.

    Attributes:
        item_N: The chunk of each piece, as an index into the batch, ascending.
        dtype_N: The dtype of each piece, as an index into `ChunkMap.dtypes`.
        offset_N: First value of each piece in its chunk.
        element_N: First element of each piece in its checkpoint's packed form, in units of its dtype.
        length_N: Number of values of each piece.
    """

    item_N: np.ndarray
    dtype_N: np.ndarray
    offset_N: np.ndarray
    element_N: np.ndarray
    length_N: np.ndarray

    def of_items(self, first: int, last: int) -> Pieces:
        """Returns the pieces of a part of the batch; `item_N` counts from its first chunk."""
        begin, end = np.searchsorted(self.item_N, (first, last))
        return Pieces(
            item_N=self.item_N[begin:end] - first,
            dtype_N=self.dtype_N[begin:end],
            offset_N=self.offset_N[begin:end],
            element_N=self.element_N[begin:end],
            length_N=self.length_N[begin:end],
        )

    def where(self, wanted_N: np.ndarray) -> Pieces:
        """Returns the pieces that a mask selects."""
        return Pieces(
            item_N=self.item_N[wanted_N],
            dtype_N=self.dtype_N[wanted_N],
            offset_N=self.offset_N[wanted_N],
            element_N=self.element_N[wanted_N],
            length_N=self.length_N[wanted_N],
        )


@dataclass(frozen=True, slots=True)
class ChunkMap:
    """The chunks of one layout, cut from its flat vector; the last may be shorter than K.

    A run is a part of the flat vector whose values have one dtype and lie side by side in the packed form.

    Attributes:
        chunk_length: Values of a chunk, K.
        num_values: Values of the flat vector, D.
        dtypes: The dtypes of real values, each once, float32 first.
        dtype_R: The dtype of each run, as an index into `dtypes`.
        start_R: First value of each run; the runs cover the flat vector.
        end_R: End of each run, exclusive.
        element_R: First element of each run in the packed form, in units of its dtype.
    """

    chunk_length: int
    num_values: int
    dtypes: tuple[torch.dtype, ...]
    dtype_R: np.ndarray
    start_R: np.ndarray
    end_R: np.ndarray
    element_R: np.ndarray

    @property
    def num_chunks(self) -> int:
        """Number of chunks, the last of which may be shorter."""
        return -(-self.num_values // self.chunk_length)

    def lengths(self, chunk_B: np.ndarray) -> np.ndarray:
        """Returns the number of values of each chunk."""
        return np.minimum(self.chunk_length, self.num_values - chunk_B * self.chunk_length)

    def pieces(self, chunk_B: np.ndarray) -> Pieces:
        """Cuts chunks at the ends of runs."""
        start_B = chunk_B * self.chunk_length
        end_B = start_B + self.lengths(chunk_B)
        first_B = np.searchsorted(self.end_R, start_B, side="right")
        count_B = np.searchsorted(self.start_R, end_B, side="left") - first_B
        item_N = np.repeat(np.arange(len(chunk_B)), count_B)
        run_N = np.arange(len(item_N)) + np.repeat(first_B - np.cumsum(count_B) + count_B, count_B)
        start_N = np.maximum(start_B[item_N], self.start_R[run_N])
        return Pieces(
            item_N=item_N,
            dtype_N=self.dtype_R[run_N],
            offset_N=start_N - start_B[item_N],
            element_N=self.element_R[run_N] + start_N - self.start_R[run_N],
            length_N=np.minimum(end_B[item_N], self.end_R[run_N]) - start_N,
        )


@lru_cache(maxsize=256)
def chunk_map(layout: Layout, chunk_length: int) -> ChunkMap:
    """Cuts a layout's flat vector into chunks of `chunk_length` values."""
    runs: list[tuple[torch.dtype, int, int, int]] = []
    value = 0
    for spec, byte in zip(layout.tensors, layout.byte_offsets, strict=False):
        if not spec.is_generated or not spec.num_values:
            continue
        dtype = spec.torch_dtype.to_real() if spec.torch_dtype.is_complex else spec.torch_dtype
        element, end = byte // dtype.itemsize, value + spec.num_values
        if runs and runs[-1][0] == dtype and runs[-1][3] + value - runs[-1][1] == element:
            runs[-1] = (dtype, runs[-1][1], end, runs[-1][3])
        else:
            runs.append((dtype, value, end, element))
        value = end
    dtypes = tuple(sorted({run[0] for run in runs}, key=lambda dtype: (dtype != torch.float32, str(dtype))))
    table = np.array([(dtypes.index(run[0]), *run[1:]) for run in runs], dtype=np.int64).reshape(-1, 4)
    return ChunkMap(chunk_length, value, dtypes, *table.T.copy())
