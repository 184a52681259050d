"""The largest amount of anonymous memory that a piece of work takes; pages of mapped files do not count."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from raywgen.training.step_meter import anonymous_bytes

_PERIOD = 0.002


@contextmanager
def memory_peak() -> Iterator[Callable[[], int]]:
    """Samples this process' anonymous memory; the function gives the largest amount seen so far, in bytes.

    Raises:
        OSError: The kernel does not report it.
    """
    most, is_done = _anonymous(), threading.Event()

    def watch() -> None:
        nonlocal most
        while not is_done.is_set():
            most = max(most, _anonymous())
            time.sleep(_PERIOD)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: most
    finally:
        is_done.set()
        thread.join()


def _anonymous() -> int:
    if (found := anonymous_bytes()) is None:
        raise OSError("this system does not report anonymous memory; the benchmark needs Linux")
    return found
