"""Several streams as one, drawn by weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Generic

import numpy as np

from raywgen.corpus.batch_stream import Batch, BatchStream
from raywgen.corpus.errors import CorpusError
from raywgen.corpus.order import Cursor


class MixedStream(Generic[Batch]):
    """Batches of several streams without end; which one comes next depends on the seed and its number alone.

    So all workers draw alike. A stream that comes to its end begins its next epoch.

    Args:
        streams: Of corpora, layouts or queries.
        weights: How often each is drawn, in any unit.
        seed: Of the draws.

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
        """Number of the stream, and its batch."""
        running = [iter(stream) for stream in self._streams]
        while True:
            draw = np.random.Generator(np.random.Philox(key=[self._seed, self._drawn])).random()
            index = int(np.searchsorted(self._shares, draw, side="right"))
            batch = next(running[index])
            self._drawn += 1
            yield index, batch

    def to_json(self) -> dict[str, Any]:
        """Where it goes on, for a checkpoint."""
        return {"drawn": self._drawn, "cursors": [stream.cursor.to_json() for stream in self._streams]}

    def go_to(self, place: dict[str, Any]) -> None:
        """Goes on after a checkpoint's `to_json`; call it before iterating."""
        self._drawn = place["drawn"]
        for stream, cursor in zip(self._streams, place["cursors"], strict=True):
            stream.cursor = Cursor(**cursor)
