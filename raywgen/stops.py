"""Handles Ctrl-C and SIGTERM: a command stops cleanly, says what is kept, and exits with the usual status."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Stopped(SystemExit):
    """A signal asked the process to end; the exit status is 128 plus its number.

    Attributes:
        kept: A sentence about what is kept and how to continue.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number
        self.kept = ""

    def __str__(self) -> str:
        kept = self.kept or "the same command does the work again from its beginning"
        return f"stopped by {_NAMES.get(signal.Signals(self.number), self.number)}: {kept}"


class Stop:
    """The signals received in a block of `stop_signals`.

    Attributes:
        number: The first signal received inside `awaited`, or None.
    """

    raised: Stopped | None = None
    """The `Stopped` that a signal of this process has raised last."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._is_patient = False

    def asked(self) -> bool:
        """Whether a signal was received."""
        return self.number is not None

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Marks a block that polls `asked` and ends by itself; a signal does not interrupt it within the grace time."""
        self._is_patient = True
        try:
            yield
        finally:
            self._is_patient = False

    def receive(self, number: int, grace: float) -> None:
        """Stores a first signal inside `awaited`; raises `Stopped` for any other."""
        if self.number is not None or not self._is_patient:
            Stop.raised = Stopped(number)
            raise Stop.raised
        self.number = number
        signal.signal(signal.SIGALRM, lambda late, frame: self.receive(number, grace))
        signal.setitimer(signal.ITIMER_REAL, grace)


@contextmanager
def stop_signals(grace: float = 0.0) -> Iterator[Stop]:
    """Makes SIGINT and SIGTERM raise `Stopped`, within `Stop.awaited` only after a grace time or a second signal.

    Only the main thread can set handlers; in any other thread this does nothing.

    Args:
        grace: Seconds between a first signal in `Stop.awaited` and `Stopped`.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        stop.receive(number, grace)

    before = {number: signal.getsignal(number) for number in (*_SIGNALS, signal.SIGALRM)}
    for number in _SIGNALS:
        signal.signal(number, handle)
    Stop.raised = None
    try:
        with _restored():
            yield stop
    finally:
        if grace:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            # None means that the handler was not set by Python, which cannot restore it.
            if handler is not None:
                signal.signal(number, handler)


@contextmanager
def keeping(kept: str) -> Iterator[None]:
    """Adds what is kept of a block's work to a `Stopped` that interrupts it."""
    try:
        with _restored():
            yield
    except Stopped as stopped:
        stopped.kept = stopped.kept or kept
        raise


@contextmanager
def _restored() -> Iterator[None]:
    """Raises the `Stopped` of a signal where Ray has put another `SystemExit` in its place, as its waits do."""
    try:
        yield
    except SystemExit as ended:
        if isinstance(ended, Stopped) or Stop.raised is None:
            raise
        raise Stop.raised from None
