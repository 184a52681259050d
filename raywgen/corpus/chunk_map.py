"""Where chunks of the flat vector lie in a checkpoint's bytes.

Shape legend: C chunks of a checkpoint, K values of a chunk, P packed bytes.
"""

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
    """Chunks of one layout.

    Attributes:
        length_C: Values of each chunk; the last may be shorter than K.
        word_C: Where each starts in the packed form, in words of 4 bytes; -1 where it is not a run of float32.
    """

    length_W: np.ndarray
    word_W: np.ndarray

    @property
    def num_chunks(self) -> int:
        """C."""
        return len(self.length_W)


@lru_cache(maxsize=256)
def chunk_map(layout: Layout, chunk_length: int) -> ChunkMap:
    """The chunks of a layout's flat vector, each `chunk_length` values but the last."""
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
    """Stretches of float32 without gaps: first value, first word, end in values."""
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
