"""Times several ways to do the same in one loop, so that a busy machine slows all of them equally."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from raywgen.evaluation.few_shot.errors import FewShotError


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Milliseconds of one task.

    Attributes:
        median_ms: Median over the repetitions.
        low_ms: First quartile.
        high_ms: Third quartile.
    """

    median_ms: float
    low_ms: float
    high_ms: float


def time_alternating(
    candidates: Mapping[str, Callable[[], object]],
    *,
    repetitions: int = 30,
    warm_up: int = 3,
    tasks_per_call: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Times each candidate once a round, with one thread.

    Args:
        candidates: Functions to time, by name.
        repetitions: Number of timed rounds.
        warm_up: Number of rounds before them, which are not counted.
        tasks_per_call: Tasks that a call works on; times are divided by it.
        clock: Gives seconds; `time.thread_time` counts those of the processor in this thread, so that what else runs
            on the machine hardly matters.

    Raises:
        FewShotError: There is nothing to time, or not often enough for a spread.
    """
    if not candidates or repetitions < 2 or warm_up < 0 or tasks_per_call < 1:
        raise FewShotError(
            f"{len(candidates)} candidates, repetitions={repetitions}, warm_up={warm_up}, "
            f"tasks_per_call={tasks_per_call}: give a candidate, two repetitions, one task, and nothing negative"
        )
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    with one_thread():
        for _ in range(warm_up + repetitions):
            for name, call in candidates.items():
                seconds[name].append(_seconds(call, clock))
    scale = 1e3 / tasks_per_call
    return {name: _timing([scale * value for value in values[warm_up:]]) for name, values in seconds.items()}


def _seconds(call: Callable[[], object], clock: Callable[[], float]) -> float:
    begin = clock()
    call()
    return clock() - begin


def _timing(milliseconds: list[float]) -> Timing:
    low, median, high = statistics.quantiles(milliseconds, n=4, method="inclusive")
    return Timing(median_ms=median, low_ms=low, high_ms=high)


@contextmanager
def one_thread() -> Iterator[None]:
    """Sets torch to one thread for a while, since the threads of parallel workers would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
