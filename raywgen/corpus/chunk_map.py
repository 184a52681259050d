"""Maps chunks of the flat vector to the bytes of a checkpoint. Here W is the number of chunks of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from raywgen.weights import Layout

_WORD = 4
# Complex values lie as pairs of real ones.
_IN_WORDS = ("float32", "complex64")


@dataclass(frozen=True, slots=True)
class ChunkMap:
    """The chunks of one layout.

    Attributes:
        length_W: Number of values of each chunk; the last may be shorter than K.
        word_W: Start of each chunk in the packed form, in 4-byte words; -1 if it is not contiguous float32.
    """

    length_W: np.ndarray
    word_W: np.ndarray

    @property
    def num_chunks(self) -> int:
        """Number of chunks, W."""
        return len(self.length_W)


@lru_cache(maxsize=256)
def chunk_map(layout: Layout, chunk_length: int) -> ChunkMap:
    """Cuts a layout's flat vector into chunks of `chunk_length` values; the last may be shorter."""
    num = -(-layout.num_values // chunk_length)
    start_W = np.arange(num, dtype=np.int64) * chunk_length
    length_W = np.minimum(chunk_length, layout.num_values - start_W)
    values, words, ends = _runs(layout)
    if not len(values):
        return ChunkMap(length_W, np.full(num, -1, dtype=np.int64))
    run_W = np.maximum(np.searchsorted(values, start_W, side="right") - 1, 0)
    inside = (start_W >= values[run_W]) & (start_W + length_W <= ends[run_W])
    return ChunkMap(length_W, np.where(inside, words[run_W] + start_W - values[run_W], -1))


def _runs(layout: Layout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns runs of contiguous float32 values: first value, first word, end in values."""
    runs: list[tuple[int, int, int]] = []
    value = 0
    for spec, byte in zip(layout.tensors, layout.byte_offsets, strict=False):
        if spec.is_generated and spec.dtype in _IN_WORDS and spec.num_values:
            word = byte // _WORD
            if runs and runs[-1][2] == value and runs[-1][1] + runs[-1][2] - runs[-1][0] == word:
                runs[-1] = (runs[-1][0], runs[-1][1], value + spec.num_values)
            else:
                runs.append((value, word, value + spec.num_values))
        if spec.is_generated:
            value += spec.num_values
    table = np.array(runs, dtype=np.int64).reshape(-1, 3)
    return table[:, 0], table[:, 1], table[:, 2]
