"""A pool of Ray actors that works through items: an actor that dies costs one attempt at one item.

Ray's own retries are off. Ray would start work whose process was killed for want of memory again without end and
without a word, beside as many others as before; a restarted actor that finds no room would keep its items for ever.
`ray.util.ActorPool` raises the first error and loses what a dead actor held, so it does not serve here.

A few items are with each actor at any time, so that it never idles and results never pile up before they are taken.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from raywgen.trust import trusted, trusting

Item = TypeVar("Item")
Result = TypeVar("Result")
OnNews = Callable[[str], None]
OnShare = Callable[[float], None]
"""Called with the share of an item that is done, from 0 to 1."""
_MOST_DEATHS = 4
_MOST_STARTING = 64
_LOOK_SECONDS = 10.0
_PATIENCE_SECONDS = 600.0
_SECONDS_BETWEEN_SHARES = 2.0


class NoResourcesError(RuntimeError):
    """The cluster has no room for a single actor; the message says what is needed and what there is."""


class ActorsLostError(RuntimeError):
    """Actors die again and again, or never begin; the message names the likely cause and the remedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolConfig:
    """The number of actors, and the messages for a user when they fail.

    Attributes:
        num_cpus: CPUs of an actor.
        max_actors: Actors at most; None for as many as the cluster has room for.
        ahead: Items that are with an actor at a time.
        start_timeout: Seconds to wait for a first actor while the cluster is full.
        death_remedy: A clause that says what to do where actors die.
        room_remedy: A clause that says what to do where no actor can start.
    """

    num_cpus: int = 1
    max_actors: int | None = None
    ahead: int = 1
    start_timeout: float = math.inf
    death_remedy: str
    room_remedy: str


def paced(on_share: OnShare) -> OnShare:
    """Passes a share on if the last one was passed on some seconds ago."""
    last = time.monotonic()

    def report(share: float) -> None:
        nonlocal last
        if time.monotonic() - last >= _SECONDS_BETWEEN_SHARES:
            last = time.monotonic()
            on_share(share)

    return report


class _Worker:
    """Runs items in a process of its own."""

    def __init__(self, work: Callable[[Any, OnShare], Any], trust: tuple[str, ...]) -> None:
        self._work, self._trust = work, trust

    def ready(self) -> tuple[str, None]:
        """Returns `("ready", None)` once the process is there."""
        return "ready", None

    def run(self, item: Any) -> Iterator[tuple[str, Any]]:
        """Yields `("share", SHARE)` while work goes on, and last `("result", RESULT)`."""
        yield "share", 0.0
        shares: SimpleQueue[float | None] = SimpleQueue()

        def trusting_work() -> Any:
            with trusting(*self._trust):
                return self._work(item, paced(shares.put))

        # Work calls back, a Ray generator yields: the thread joins the two.
        with ThreadPoolExecutor(max_workers=1) as thread:
            result = thread.submit(trusting_work)
            result.add_done_callback(lambda _: shares.put(None))
            while (share := shares.get()) is not None:
                yield "share", share
        yield "result", result.result()


class ActorPool(Generic[Item, Result]):
    """Actors that work through items, in whatever order they get done.

    When an actor dies the pool shrinks to the actors at work, and the item waits; each item that is done brings one of
    both back. So fewer run at once the scarcer memory is. After several deaths an item is given up: nothing new is
    handed out then, what is under way is finished, and the end is an error.

    Args:
        work: Called in an actor with an item and a function that takes the share of it that is done. It is sent to
            each actor once; what it keeps in itself serves all later items of that actor.
        config: Size and messages.
        name_of: Returns an item's name for messages.
        on_news: Called with a sentence when an actor was lost, and when there is no room for any.
        on_share: Called with an item's index and the share of it that is done; a share falls back to 0 where an actor
            died.
    """

    def __init__(
        self,
        work: Callable[[Item, OnShare], Result],
        config: PoolConfig,
        name_of: Callable[[Item], str],
        on_news: OnNews | None = None,
        on_share: Callable[[int, float], None] | None = None,
    ) -> None:
        import ray

        self._ray: Any = ray
        # SPREAD and not the default: inside a trial of Ray Tune that would ask for the CPU that the trial itself holds.
        self._actor_class: Any = ray.remote(_Worker).options(
            num_cpus=config.num_cpus, scheduling_strategy="SPREAD", max_restarts=0
        )
        self._work, self._trust = ray.put(work), trusted()
        self._config, self._name_of = config, name_of
        self._on_news = on_news or (lambda sentence: None)
        self._on_share = on_share or (lambda index, share: None)
        self._items: Sequence[Item] = ()
        self._queue: deque[int] = deque()
        self._waiting: deque[int] = deque()
        self._starting: dict[Any, Any] = {}
        self._assigned: dict[Any, deque[tuple[Any, int]]] = {}
        self._deaths: Counter[int] = Counter()
        self._limit = math.inf if config.max_actors is None else config.max_actors
        self._deaths_in_vain = 0
        self._given_up = ""

    def run(self, items: Sequence[Item]) -> Iterator[tuple[int, Result]]:
        """Yields the index of each item with its result, in the order in which they are done.

        Raises:
            NoResourcesError: No actor could start within `start_timeout`.
            ActorsLostError: Actors died again and again at one item, or none began though CPUs were free.
            Exception: What `work` raises.
        """
        self._items, self._queue = items, deque(range(len(items)))
        while self._is_busy or (not self._given_up and (self._queue or self._waiting)):
            if not self._given_up:
                self._retry_if_idle()
                self._grow()
                self._hand_out()
            actor, ref = self._next()
            try:
                kind, value = self._ray.get(ref if ref in self._starting else next(ref))
            except self._ray.exceptions.RayTaskError as error:
                raise (error.cause or error) from None
            except self._ray.exceptions.RayError as error:
                self._on_failure(actor, error)
                continue
            if kind == "ready":
                self._assigned[self._starting.pop(ref)] = deque()
            elif kind == "share":
                self._on_share(self._assigned[actor][0][1], value)
            else:
                _, index = self._assigned[actor].popleft()
                yield index, value
                self._on_result()
        if self._given_up:
            raise ActorsLostError(self._given_up)

    def shutdown(self) -> None:
        """Ends all actors."""
        for actor in (*self._assigned, *self._starting.values()):
            self._ray.kill(actor)
        self._assigned, self._starting = {}, {}

    @property
    def _is_busy(self) -> bool:
        return any(self._assigned.values())

    def _add(self) -> None:
        """Starts an actor, which gets its first item once it is there: one that waits for room holds none."""
        actor = self._actor_class.remote(self._work, self._trust)
        self._starting[actor.ready.remote()] = actor

    def _grow(self) -> None:
        """Adds actors while there is more to do than those under way to start can take."""
        num_useful = min(_MOST_STARTING, len(self._queue), max(1, self._limit) - len(self._assigned))
        while len(self._starting) < num_useful:
            self._add()

    def _hand_out(self) -> None:
        """Gives one item to each actor, then the second ones: the last items should not wait behind others."""
        for depth in range(1, self._config.ahead + 1):
            for actor, assigned in self._assigned.items():
                if self._queue and len(assigned) < depth:
                    index = self._queue.popleft()
                    stream = actor.run.options(num_returns="streaming").remote(self._items[index])
                    assigned.append((stream, index))

    def _on_result(self) -> None:
        """Brings an actor and an item that were lost back, now that another item is done."""
        self._limit = min(self._limit + 1, self._config.max_actors or math.inf)
        self._deaths_in_vain = 0
        if self._waiting:
            self._queue.append(self._waiting.popleft())

    def _retry_if_idle(self) -> None:
        """Retries an item where nothing is under way; after a while, as others than these may have taken the memory."""
        has_actors = bool(self._assigned or self._starting)
        if self._is_busy or not self._waiting or (self._queue and has_actors):
            return
        index = self._waiting.pop()
        time.sleep(2 ** self._deaths[index])
        # Others come first; but where all of them fail, the same one is tried until it is given up.
        put = self._queue.appendleft if self._deaths_in_vain >= _MOST_DEATHS else self._queue.append
        put(index)

    def _next(self) -> tuple[Any, Any]:
        """Returns the next actor with news and what the news are: that it is ready, or those of its first item.

        Raises:
            NoResourcesError, ActorsLostError: No actor has begun for long.
        """
        owners = dict(self._starting)
        owners |= {assigned[0][0]: actor for actor, assigned in self._assigned.items() if assigned}
        begin = free_since = time.monotonic()
        is_said = False
        while True:
            seconds = None if self._is_busy else max(0.0, min(_LOOK_SECONDS, self._config.start_timeout))
            ready, _ = self._ray.wait(list(owners), num_returns=1, timeout=seconds, fetch_local=False)
            if ready:
                return owners[ready[0]], ready[0]
            free, total = (
                resources.get("CPU", 0.0)
                for resources in (self._ray.available_resources(), self._ray.cluster_resources())
            )
            now = time.monotonic()
            if free < self._config.num_cpus:
                free_since = now
            if not is_said:
                self._on_news(f"waiting for a worker: the cluster has {total:g} CPUs, {free:g} of them free")
                is_said = True
            if now - begin >= self._config.start_timeout:
                raise NoResourcesError(
                    f"no actor could start within {self._config.start_timeout:g} s: each needs "
                    f"{self._config.num_cpus} CPUs of one node, the cluster has {total:g}, {free:g} of them free; "
                    f"{self._config.room_remedy}"
                )
            if now - free_since > _PATIENCE_SECONDS:
                raise ActorsLostError(
                    f"no worker has begun for {_PATIENCE_SECONDS:g} s, though {free:g} of {total:g} CPUs are free; "
                    f"{self._config.room_remedy}; see also the logs of Ray"
                )

    def _on_failure(self, actor: Any, error: Exception) -> None:
        """Takes a dead actor's items back; the one under way, or the next if none was, waits or is given up."""
        self._queue.extendleft(index for _, index in reversed(self._assigned.pop(actor, deque())))
        # Its process may live on where only its answer was lost.
        for other in {actor, *self._starting.values()}:
            self._ray.kill(other)
        self._starting = {}
        self._limit = len(self._assigned)
        if not self._queue:
            return
        index = self._queue.popleft()
        self._deaths_in_vain += 1
        self._deaths[index] += 1
        self._on_share(index, 0.0)
        name, deaths = self._name_of(self._items[index]), self._deaths[index]
        is_memory = isinstance(error, self._ray.exceptions.OutOfMemoryError)
        reason = "killed, as its node ran out of memory" if is_memory else f"lost ({type(error).__name__})"
        if deaths < _MOST_DEATHS:
            self._waiting.append(index)
            self._on_news(f"the worker of {name} was {reason}; tried again once another is done")
        elif not self._given_up:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            self._given_up = (
                f"{name} was given up: each of its {deaths} workers was {reason}. The likely cause is want of memory: "
                f"{self._config.death_remedy}. Ray says: {lines[0] if lines else error}"
            )
            self._on_news(f"{name} is given up; what has been started is done before the end")
