"""Chunks of all checkpoints as a stream of batches, for workers that train on weights at scale.

Every worker opens the corpus itself and reads its items straight from the memory-mapped shards into buffers that are
reused: no bytes pass through Ray, memory does not grow with the corpus, and any worker can start at any batch.

Here B is the number of chunks of a batch on this worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raywgen.corpus.batch_stream import BatchStream, check_shares, select
from raywgen.corpus.chunk_copy import copy_chunks
from raywgen.corpus.chunk_map import ChunkMap, chunk_map
from raywgen.corpus.corpus import Corpus
from raywgen.corpus.errors import CorpusError
from raywgen.corpus.order import Cursor, EpochOrder
from raywgen.corpus.shards import ShardView
from raywgen.weights import Layout

_BLOCK_VALUES = 1 << 20
_BLOCKS_PER_WINDOW = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkBatch:
    """A batch of chunks from any checkpoints.

    The tensors are overwritten `prefetch` batches later: copy what you need longer.

    Attributes:
        values_BK: Values, float32; zeros beyond a chunk's length. They are in pinned memory if there is a CUDA device.
        length_B: Number of values of each chunk, int64.
        checkpoint_B: Row of each chunk's checkpoint in the stream's `facts`, int64.
        chunk_B: Index of each chunk in its checkpoint, int64.
        cursor: Cursor of the next batch; a new stream with this cursor begins there.
    """

    values_BK: Tensor
    length_B: Tensor
    checkpoint_B: Tensor
    chunk_B: Tensor
    cursor: Cursor


class ChunkStream(BatchStream[ChunkBatch]):
    """Endless batches of chunks.

    Args:
        corpus: The corpus to read.
        chunk_length: Values of a chunk, K.
        batch_size: Number of chunks of a batch, over all workers.
        terms: Query that selects checkpoints, as `Corpus.query` takes it.
        seed: Seed of the order; the order of an epoch depends on nothing else.
        rank: Rank of this worker.
        num_workers: Number of workers.
        cursor: The batch to start with.
        prefetch: Number of batches that a thread reads ahead; 0 reads on demand.

    Raises:
        CorpusError: Nothing is selected, or a number is out of range.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        chunk_length: int,
        batch_size: int,
        terms: Sequence[str] = (),
        seed: int = 0,
        rank: int = 0,
        num_workers: int = 1,
        cursor: Cursor | None = None,
        prefetch: int = 2,
    ) -> None:
        check_shares(batch_size, rank, num_workers, prefetch)
        if chunk_length < 1:
            raise CorpusError(f"chunk_length={chunk_length} must be at least 1")
        # In the order of the disk, so that a block is read in one go.
        self.facts = select(corpus, terms, ["shard", "row"])
        self._corpus = corpus
        self._K = chunk_length
        self._index(corpus, chunk_length)
        order = EpochOrder(
            int(self._end_N[-1]),
            batch_size,
            block_size=max(1, _BLOCK_VALUES // chunk_length),
            blocks_per_window=_BLOCKS_PER_WINDOW,
            seed=seed,
        )
        super().__init__(order, rank=rank, num_workers=num_workers, cursor=cursor, prefetch=prefetch)
        rows = -(-batch_size // num_workers)
        # One that the caller holds, one being filled, and the prefetched ones.
        pinned = torch.cuda.is_available()
        self._buffers = [torch.zeros(rows, chunk_length, pin_memory=pinned) for _ in range(prefetch + 2)]
        self._turn = 0

    def _index(self, corpus: Corpus, chunk_length: int) -> None:
        """Numbers all chunks, and records shard and row of each of the N checkpoints."""
        paths = self.facts.column("shard").to_pylist()
        shards = {path: index for index, path in enumerate(dict.fromkeys(paths))}
        self._layouts: list[Layout] = [corpus.form(path) for path in shards]
        self._maps: list[ChunkMap] = [chunk_map(layout, chunk_length) for layout in self._layouts]
        self._shard_N = np.array([shards[path] for path in paths])
        counts_N = np.array([chunks.num_chunks for chunks in self._maps])[self._shard_N]
        self._end_N = np.cumsum(counts_N)
        self._paths = list(shards)
        self._row_N = self.facts.column("row").to_numpy()

    def places(self, cursor: Cursor) -> tuple[np.ndarray, np.ndarray]:
        """Returns this worker's items of a batch without reading them: rows of `facts`, and chunk indices."""
        item_B = self.items(cursor)
        checkpoint_B = np.searchsorted(self._end_N, item_B, side="right")
        before_B = np.where(checkpoint_B > 0, self._end_N[checkpoint_B - 1], 0)
        return checkpoint_B, item_B - before_B

    def read(self, cursor: Cursor) -> ChunkBatch:
        """Reads this worker's part of a batch."""
        checkpoint_B, chunk_B = self.places(cursor)
        self._turn = (self._turn + 1) % len(self._buffers)
        values_BK = self._buffers[self._turn][: len(chunk_B)]
        length_B = np.empty(len(chunk_B), dtype=np.int64)
        edges = np.flatnonzero(np.diff(self._shard_N[checkpoint_B])) + 1
        for part in np.split(np.arange(len(chunk_B)), edges):
            if len(part):
                length_B[part] = self._fill(values_BK[part[0] : part[-1] + 1], checkpoint_B[part], chunk_B[part])
        return ChunkBatch(
            values_BK=values_BK,
            length_B=torch.from_numpy(length_B),
            checkpoint_B=torch.from_numpy(checkpoint_B),
            chunk_B=torch.from_numpy(chunk_B),
            cursor=self.after(cursor),
        )

    def _fill(self, out_BK: Tensor, checkpoint_B: np.ndarray, chunk_B: np.ndarray) -> np.ndarray:
        """Reads chunks of one shard; returns their lengths."""
        shard = self._shard_N[checkpoint_B[0]]
        view = self._corpus.view(self._paths[shard], self._layouts[shard])
        assert isinstance(view, ShardView), "a stream reads mapped shards"
        return copy_chunks(view, self._maps[shard], self._row_N[checkpoint_B], chunk_B, out_BK)
