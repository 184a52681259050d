"""Draws the batches of the next steps in a thread while the step under way computes.

Order and values are those of drawing each batch in its own step: every batch is a function of its step alone, by keyed
noise, and the thread draws from no generator of torch's own.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TypeVar

from raywgen.weights import KeyedNoise, WeightBatch

_NUM_AHEAD = 2
# Batches of large whole networks are drawn when they are needed: keeping several would cost more than it saves.
_MAX_BYTES_AHEAD = 256 << 20
# Small batches are drawn several in a row: the first one takes three times as long as the next, because the step under
# way has taken all that drawing needs out of the caches.
_NUM_SMALL_AHEAD = 8
_SMALL_BYTES_AHEAD = 32 << 20

T = TypeVar("T")
DrawnBatch = tuple[WeightBatch, KeyedNoise]


def num_ahead(batch_bytes: int) -> int:
    """Returns the most batches of a size that are ready at a time."""
    small = min(_NUM_SMALL_AHEAD, _SMALL_BYTES_AHEAD // max(1, batch_bytes))
    return max(small, min(_NUM_AHEAD, _MAX_BYTES_AHEAD // max(1, batch_bytes)))


class Prefetch:
    """Draws batches in a thread, some ahead; a context manager, at whose end the thread has ended too.

    Args:
        draw: Returns the batch of a step. It runs in the thread alone.
        steps: The steps whose batches are drawn, in order.
    """

    def __init__(self, draw: Callable[[int], DrawnBatch], steps: range) -> None:
        self._draw, self._steps = draw, steps
        self._ready: deque[DrawnBatch | BaseException] = deque()
        self._changed = threading.Condition()
        self._drawing = threading.Lock()
        self._is_wanted, self._is_over, self._is_filling = False, False, True
        self._batch_bytes = 0
        self._thread = threading.Thread(target=self._run, name="raywgen-prefetch", daemon=True)

    def __enter__(self) -> Prefetch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        self._thread.join()

    def next(self) -> DrawnBatch:
        """Returns the batch of the next step, waiting for it if need be; raises what drawing it has raised."""
        with self._changed:
            self._is_wanted = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ready)
            self._is_wanted = False
            found = self._ready.popleft()
            self._changed.notify_all()
        if isinstance(found, BaseException):
            raise found
        return found

    def aside(self, items: Iterator[T]) -> Iterator[T]:
        """Yields what another iterator reads of the corpus: the thread draws nothing while it reads."""
        while True:
            with self._drawing:
                found = next(items, None)
            if found is None:
                return
            yield found

    def _run(self) -> None:
        for step in self._steps:
            with self._changed:
                self._changed.wait_for(self._may_draw)
                if self._is_over:
                    return
            found = self._drawn(step)
            with self._changed:
                self._ready.append(found)
                self._changed.notify_all()
            if isinstance(found, BaseException):
                return

    def _may_draw(self) -> bool:
        if self._is_over or (self._is_wanted and not self._ready):
            return True
        most, num_ready = num_ahead(self._batch_bytes), len(self._ready)
        self._is_filling = num_ready < most and (self._is_filling or 2 * num_ready <= most)
        return self._is_filling

    def _drawn(self, step: int) -> DrawnBatch | BaseException:
        """Returns the batch of a step, or what drawing it has raised."""
        try:
            with self._drawing:
                batch, noise = self._draw(step)
        except BaseException as error:
            return error
        parts = (batch.values_BD, batch.targets_BAD, batch.codes_BWL, batch.moments_BYK)
        self._batch_bytes = sum(part.nbytes for part in parts if part is not None)
        return batch, noise
