"""Mixes several streams into one by weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Generic, TypedDict

import numpy as np

from raywgen.corpus.batch_stream import Batch, BatchStream
from raywgen.corpus.errors import CorpusError
from raywgen.corpus.order import Cursor


class MixedCursor(TypedDict):
    """The position of a `MixedStream`: the number of draws, and the cursor of each stream."""

    drawn: int
    cursors: list[dict[str, int]]


class MixedStream(Generic[Batch]):
    """Draws endless batches from several streams by seed and batch number alone, so that all workers draw alike.

    A stream that ends begins its next epoch.

    Args:
        streams: Streams of corpora, layouts or queries.
        weights: Relative frequency of each stream.
        seed: Seed of the draws.

    Raises:
        CorpusError: There is not one weight for each stream, or one is not positive.
    """

    def __init__(self, streams: Sequence[BatchStream[Batch]], weights: Sequence[float], seed: int = 0) -> None:
        if len(streams) != len(weights) or not streams or min(weights) <= 0:
            raise CorpusError(f"{len(streams)} streams with weights {list(weights)}: give each a positive weight")
        self._streams = list(streams)
        self._shares = np.cumsum(weights) / np.sum(weights)
        self._seed = seed
        self._drawn = 0

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        """Yields the index of the stream, and its batch."""
        running = [iter(stream) for stream in self._streams]
        while True:
            draw = np.random.Generator(np.random.Philox(key=[self._seed, self._drawn])).random()
            index = int(np.searchsorted(self._shares, draw, side="right"))
            batch = next(running[index])
            self._drawn += 1
            yield index, batch

    def to_json(self) -> MixedCursor:
        """Returns the position of the stream, for a checkpoint."""
        return {"drawn": self._drawn, "cursors": [stream.cursor.to_json() for stream in self._streams]}

    def go_to(self, place: MixedCursor) -> None:
        """Continues at a position from `to_json`; call it before iterating."""
        self._drawn = place["drawn"]
        for stream, cursor in zip(self._streams, place["cursors"], strict=True):
            stream.cursor = Cursor(**cursor)
