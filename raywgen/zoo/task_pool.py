"""Units of work as Ray tasks: a worker that dies costs one attempt, and what cannot be done is told.

Ray's own retries are off. A task whose worker was killed for want of memory it would start again without end and
without a word (`RAY_task_oom_retries` is -1), beside as many others as before. Here its unit waits until another one
is done, so that fewer run at once the scarcer memory is, and is given up after a few deaths.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, TypeVar

from raywgen.trust import trusted, trusting

Unit = TypeVar("Unit")
Result = TypeVar("Result")
OnNews = Callable[[str], None]
OnShare = Callable[[float], None]
"""Called with the share of a unit that is done, from 0 to 1."""
_MOST_DEATHS = 4
_LOOK_SECONDS = 10.0
_PATIENCE_SECONDS = 600.0
_SECONDS_BETWEEN_SHARES = 2.0


class WorkersLostError(RuntimeError):
    """Workers that die again and again, or that never begin; the message names the likely cause and the remedy."""


def over_ray(
    work: Callable[[Unit, OnShare], Result],
    units: Sequence[Unit],
    name_of: Callable[[Unit], str],
    on_news: OnNews | None = None,
    on_share: Callable[[int, float], None] | None = None,
) -> Iterator[tuple[int, Result]]:
    """Results with the places of their units, on whatever CPUs the cluster has, in the order in which they are done.

    Args:
        work: One CPU's work on a unit; it may report the share that is done.
        units: To be done.
        name_of: A unit's name.
        on_news: Told in words of a worker that died, and of what is waited for.
        on_share: Called with a unit's place and the share of it that is done, every few seconds; a share falls back
            to 0 where a worker died.

    Raises:
        WorkersLostError: The workers of a unit died again and again, or none began though CPUs were free. All else
            that had been started was done before.
        Exception: What `work` raises.
    """
    yield from _Crew(work, units, name_of, on_news or (lambda told: None), on_share or (lambda *share: None)).work()


def paced(on_share: OnShare) -> OnShare:
    """Passes a share on if the last one was passed on some seconds ago."""
    last = time.monotonic()

    def report(share: float) -> None:
        nonlocal last
        if time.monotonic() - last >= _SECONDS_BETWEEN_SHARES:
            last = time.monotonic()
            on_share(share)

    return report


def _reporting(work: Callable[[Any, OnShare], Any], unit: Any, trust: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Yields `("share", 0.0)` once a worker has begun, later shares as they come, and last `("result", RESULT)`."""
    yield "share", 0.0
    shares: SimpleQueue[float | None] = SimpleQueue()

    def trusting_work() -> Any:
        with trusting(*trust):
            return work(unit, paced(shares.put))

    # Work calls back, a Ray task yields: the thread joins the two.
    with ThreadPoolExecutor(max_workers=1) as pool:
        result = pool.submit(trusting_work)
        result.add_done_callback(lambda _: shares.put(None))
        while (share := shares.get()) is not None:
            yield "share", share
    yield "result", result.result()


class _Crew:
    """Units under way, those whose workers have begun, and those that lost one and wait."""

    def __init__(
        self,
        work: Any,
        units: Sequence[Any],
        name_of: Callable[[Any], str],
        on_news: OnNews,
        on_share: Callable[[int, float], None],
    ) -> None:
        import ray

        self._ray: Any = ray
        # SPREAD and not the default: inside a trial of Ray Tune that would ask for the CPU that the trial itself holds.
        self._task: Any = ray.remote(_reporting).options(
            num_cpus=1, scheduling_strategy="SPREAD", max_retries=0, num_returns="streaming"
        )
        self._work, self._units, self._name_of = work, units, name_of
        self._on_news, self._on_share = on_news, on_share
        self._under_way: dict[Any, int] = {}
        self._begun: set[int] = set()
        self._waiting: deque[int] = deque()
        self._deaths: Counter[int] = Counter()
        self._given_up = ""
        for place in range(len(units)):
            self._start(place)

    def work(self) -> Iterator[tuple[int, Any]]:
        while self._under_way:
            stream = self._next()
            place = self._under_way[stream]
            try:
                kind, told = self._ray.get(next(stream))
            except self._ray.exceptions.RayTaskError:
                raise
            except self._ray.exceptions.RayError as error:
                self._bury(stream, error)
            else:
                if kind == "share":
                    self._begun.add(place)
                    self._on_share(place, told)
                    continue
                self._remove(stream)
                yield place, told
                self._start_waiting()
            if not self._under_way and self._waiting and not self._given_up:
                # Alone, it waits for nobody; a while, as others than these may have taken the memory.
                time.sleep(2 ** self._deaths[self._waiting[0]])
                self._start_waiting()
        if self._given_up:
            raise WorkersLostError(self._given_up)

    def _start(self, place: int) -> None:
        self._under_way[self._task.remote(self._work, self._units[place], trusted())] = place

    def _start_waiting(self) -> None:
        if self._waiting and not self._given_up:
            self._start(self._waiting.popleft())

    def _remove(self, stream: Any) -> int:
        place = self._under_way.pop(stream)
        self._begun.discard(place)
        return place

    def _next(self) -> Any:
        """The next unit with news.

        Raises:
            WorkersLostError: There is none, nobody works, and CPUs have been free for long.
        """
        since = time.monotonic()
        is_told = False
        while True:
            ready, _ = self._ray.wait(list(self._under_way), num_returns=1, timeout=_LOOK_SECONDS)
            if ready:
                return ready[0]
            if self._begun:  # These may take their time: of a worker that dies Ray tells.
                continue
            free, total = (
                resources.get("CPU", 0.0)
                for resources in (self._ray.available_resources(), self._ray.cluster_resources())
            )
            if free < 1:
                since = time.monotonic()
            if not is_told:
                self._on_news(f"waiting for a worker: the cluster has {total:g} CPUs, {free:g} of them free")
                is_told = True
            if time.monotonic() - since > _PATIENCE_SECONDS:
                raise WorkersLostError(
                    f"no worker has begun for {_PATIENCE_SECONDS:g} s, though {free:g} of {total:g} CPUs are free; "
                    "where memory is short, workers cannot start: free some, or give Ray fewer CPUs, and run the "
                    "same command again, which keeps what is done; see also the logs of Ray"
                )

    def _bury(self, stream: Any, error: Exception) -> None:
        """A unit without a worker waits until another is done, and is given up if it has lost too many."""
        place = self._remove(stream)
        self._on_share(place, 0.0)
        self._deaths[place] += 1
        name, deaths = self._name_of(self._units[place]), self._deaths[place]
        is_memory = isinstance(error, self._ray.exceptions.OutOfMemoryError)
        reason = "killed, as its node ran out of memory" if is_memory else f"lost ({type(error).__name__})"
        if deaths < _MOST_DEATHS:
            self._waiting.append(place)
            self._on_news(f"the worker of {name} was {reason}; tried again once another is done")
        elif not self._given_up:
            said = [line.strip() for line in str(error).splitlines() if line.strip()]
            self._given_up = (
                f"{name} was given up: each of its {deaths} workers was {reason}. The likely cause is want of memory: "
                "give Ray fewer CPUs, so that fewer run at once, and run the same command again, which keeps what is "
                f"done; or begin anew with a smaller stack_size. Ray says: {said[0] if said else error}"
            )
            self._on_news(f"{name} is given up; what has been started is done before the end")
