"""The base of all streams of a corpus: an order, a cursor, prefetching."""

from __future__ import annotations

import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np
import pyarrow as pa

from raywgen.corpus.corpus import Corpus
from raywgen.corpus.errors import CorpusError
from raywgen.corpus.order import Cursor, EpochOrder


class HasCursor(Protocol):
    """A batch with the cursor of the batch after it."""

    @property
    def cursor(self) -> Cursor:
        """Cursor of the next batch."""
        ...


Batch = TypeVar("Batch", bound=HasCursor)


class BatchStream(ABC, Generic[Batch]):
    """Endless batches in an order that depends on the seed alone; iterate over it, or over `epoch()`.

    Args:
        order: The items of every batch, over all workers.
        rank: Rank of this worker.
        num_workers: Number of workers; worker r takes every `num_workers`-th item of a batch, starting at item r.
        cursor: The batch to start with.
        prefetch: Number of batches that a thread reads ahead; 0 reads on demand.
    """

    def __init__(self, order: EpochOrder, *, rank: int, num_workers: int, cursor: Cursor | None, prefetch: int) -> None:
        self.cursor = cursor or Cursor()
        self._order = order
        self._rank, self._num_workers = rank, num_workers
        self._prefetch = prefetch

    @property
    def num_items(self) -> int:
        """Number of items of an epoch, over all workers."""
        return self._order.num_items

    @property
    def num_batches(self) -> int:
        """Number of batches of an epoch."""
        return self._order.num_batches

    def __iter__(self) -> Iterator[Batch]:
        """Yields batches without end, epoch after epoch."""
        if self._prefetch == 0:
            while True:
                batch = self.read(self.cursor)
                self.cursor = batch.cursor
                yield batch
        for batch in self._ahead():
            self.cursor = batch.cursor
            yield batch

    def epoch(self) -> Iterator[Batch]:
        """Yields the remaining batches of this epoch."""
        wanted = self.cursor.epoch
        stream = iter(self)
        while self.cursor.epoch == wanted:
            batch = next(stream)
            yield batch
            if batch.cursor.epoch != wanted:
                return

    @abstractmethod
    def read(self, cursor: Cursor) -> Batch:
        """Reads this worker's part of a batch."""

    def items(self, cursor: Cursor) -> np.ndarray:
        """Returns the items of this worker's part of a batch, int64, sorted, because order within a batch is free."""
        return np.sort(self._order.batch(cursor)[self._rank :: self._num_workers])

    def after(self, cursor: Cursor) -> Cursor:
        """Returns the cursor of the next batch."""
        return self._order.after(cursor)

    def _ahead(self) -> Iterator[Batch]:
        ready: queue.Queue[Batch | Exception] = queue.Queue(maxsize=self._prefetch)
        stop = threading.Event()

        def put(item: Batch | Exception) -> None:
            while not stop.is_set():
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    continue

        def fill() -> None:
            cursor = self.cursor
            try:
                while not stop.is_set():
                    batch = self.read(cursor)
                    cursor = batch.cursor
                    put(batch)
            except Exception as error:  # handed over to the reader of the stream
                put(error)

        thread = threading.Thread(target=fill, daemon=True)
        thread.start()
        try:
            while True:
                batch = ready.get()
                if isinstance(batch, Exception):
                    raise batch
                yield batch
        finally:
            stop.set()
            thread.join()


def select(corpus: Corpus, terms: Sequence[str], order: Sequence[str]) -> pa.Table:
    """Selects the facts that satisfy all terms, and sorts them.

    Raises:
        CorpusError: No checkpoint satisfies them.
    """
    facts = corpus.query(terms).sort_by([(name, "ascending") for name in order])
    if not facts.num_rows:
        raise CorpusError(f"{corpus.location} holds no checkpoint with {' '.join(terms)}; see `raywgen corpus info`")
    return facts


def check_shares(batch_size: int, rank: int, num_workers: int, prefetch: int) -> None:
    """Refuses sizes and ranks that give no batches.

    Raises:
        CorpusError: A number is out of range.
    """
    if min(batch_size, num_workers) < 1 or not 0 <= rank < num_workers or prefetch < 0:
        raise CorpusError(
            f"batch_size={batch_size}, rank={rank} of {num_workers}, prefetch={prefetch}: sizes must be at least 1, "
            "the rank below the number of workers, and prefetch not negative"
        )
