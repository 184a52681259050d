"""The order of an epoch is a pure function of seed and epoch, whatever the number of workers.

Items form blocks of neighbours. Blocks are permuted, a window of permuted blocks is permuted item by item, and batches
are cut from the result. So neighbours on disk are read together, yet mixed with items from anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """The position of a stream: the next unread batch."""

    epoch: int = 0
    batch: int = 0

    def to_json(self) -> dict[str, int]:
        """Returns the cursor as JSON, for a checkpoint."""
        return {"epoch": self.epoch, "batch": self.batch}


class EpochOrder:
    """The items of every batch of every epoch.

    Args:
        num_items: Number of items to order.
        batch_size: Items of a batch, over all workers; the last batch of an epoch may be smaller.
        block_size: Number of neighbours that stay in one window.
        blocks_per_window: Number of blocks whose items are mixed.
        seed: Seed of the order.
    """

    def __init__(self, num_items: int, batch_size: int, *, block_size: int, blocks_per_window: int, seed: int) -> None:
        self.num_items = num_items
        self.batch_size = batch_size
        self._block_size = block_size
        self._blocks_per_window = blocks_per_window
        self._seed = seed
        self._num_blocks = -(-num_items // block_size)
        # Windows stay cached while batches are cut from them; a batch may need two at a time.
        self._window = lru_cache(maxsize=4)(self._make_window)
        self._blocks = lru_cache(maxsize=2)(self._make_blocks)

    @property
    def num_batches(self) -> int:
        """Number of batches of an epoch."""
        return -(-self.num_items // self.batch_size)

    def batch(self, cursor: Cursor) -> np.ndarray:
        """Returns the items of a batch, int64, at most `batch_size`."""
        first = cursor.batch * self.batch_size
        last = min(first + self.batch_size, self.num_items)
        _, ends = self._blocks(cursor.epoch)
        window = int(np.searchsorted(ends, first, side="right"))
        parts = []
        while first < last:
            begin = int(ends[window - 1]) if window else 0
            stop = min(last, int(ends[window]))
            parts.append(self._window(cursor.epoch, window)[first - begin : stop - begin])
            first, window = stop, window + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def after(self, cursor: Cursor) -> Cursor:
        """Returns the cursor of the next batch."""
        if cursor.batch + 1 < self.num_batches:
            return Cursor(epoch=cursor.epoch, batch=cursor.batch + 1)
        return Cursor(epoch=cursor.epoch + 1)

    def _make_blocks(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Permutes the blocks, and returns where each window ends in the epoch's sequence."""
        blocks = np.random.Generator(np.random.Philox(key=[self._seed, epoch])).permutation(self._num_blocks)
        sizes = np.full(self._num_blocks, self._block_size)
        sizes[blocks == self._num_blocks - 1] = self.num_items - (self._num_blocks - 1) * self._block_size
        ends = np.cumsum(sizes)[self._blocks_per_window - 1 :: self._blocks_per_window]
        return blocks, ends if len(ends) and ends[-1] == self.num_items else np.append(ends, self.num_items)

    def _make_window(self, epoch: int, window: int) -> np.ndarray:
        blocks, _ = self._blocks(epoch)
        chosen = blocks[window * self._blocks_per_window : (window + 1) * self._blocks_per_window]
        starts = chosen * self._block_size
        items = np.concatenate([np.arange(s, min(s + self._block_size, self.num_items)) for s in starts])
        # Each window has a random stream of its own: Philox is counter-based, so windows need no predecessor.
        draw = np.random.Generator(np.random.Philox(key=[self._seed, epoch], counter=[0, 0, 1, window]))
        return draw.permutation(items)
