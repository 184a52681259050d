"""A pool of Ray actors that processes items: an actor that dies costs one attempt at one item.

Ray's own retries are off. Ray would silently restart work that was killed for lack of memory without end, beside as
many others as before, and a restarted actor for which there is no room would keep its items for ever.
`ray.util.ActorPool` does not serve here: it raises the first error and loses the items of a dead actor.

Each actor holds a few items at any time, so that it never idles and results never pile up.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Generic, TypeVar, cast

from raywgen.trust import trusted, trusting

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

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
        num_gpus: GPUs of an actor.
        max_actors: Largest number of actors; None means as many as the cluster has room for.
        ahead: Number of items that each actor holds at a time.
        start_timeout: Seconds to wait for a first actor while the cluster is full.
        death_remedy: A clause that says what to do if actors die.
        room_remedy: A clause that says what to do if no actor can start.
    """

    num_cpus: int = 1
    num_gpus: int = 0
    max_actors: int | None = None
    ahead: int = 1
    start_timeout: float = math.inf
    death_remedy: str
    room_remedy: str


def paced(on_share: OnShare) -> OnShare:
    """Wraps a callback so that it is called at most once in a few seconds."""
    last = time.monotonic()

    def report(share: float) -> None:
        nonlocal last
        if time.monotonic() - last >= _SECONDS_BETWEEN_SHARES:
            last = time.monotonic()
            on_share(share)

    return report


class _Worker(Generic[Item, Result]):
    """Processes items in a Ray worker process."""

    def __init__(self, work: Callable[[Item, OnShare], Result], trust: tuple[str, ...]) -> None:
        self._work, self._trust = work, trust

    def ready(self) -> tuple[str, None]:
        """Returns `("ready", None)` once the process has started."""
        return "ready", None

    def run(self, item: Item) -> Iterator[tuple[str, float | Result]]:
        """Yields `("share", SHARE)` while work goes on, and last `("result", RESULT)`."""
        yield "share", 0.0
        shares: SimpleQueue[float | None] = SimpleQueue()

        def trusting_work() -> Result:
            with trusting(*self._trust):
                return self._work(item, paced(shares.put))

        # The work reports by a callback, a Ray generator yields: the thread connects the two.
        with ThreadPoolExecutor(max_workers=1) as thread:
            result = thread.submit(trusting_work)
            result.add_done_callback(lambda _: shares.put(None))
            while (share := shares.get()) is not None:
                yield "share", share
        yield "result", result.result()


class ActorPool(Generic[Item, Result]):
    """Actors that process items and return results in the order in which they finish.

    When an actor dies, the pool shrinks to the actors that are working, and the item waits. Each finished item adds one
    actor and one waiting item again, so that fewer actors run when memory is scarce. After several deaths an item is
    given up: no further items are handed out, the running ones are finished, and `run` raises an error.

    Args:
        work: Called in an actor with an item and a callback for the share of it that is done. It is sent to each actor
            once, so its own state is kept for all later items of that actor.
        config: Number of actors, and messages.
        name_of: Returns an item's name for messages.
        on_news: Called with a sentence when an actor is lost, and when there is no room for any.
        on_share: Called with an item's index and the share of it that is done; the share returns to 0 when
            its actor dies.
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
        import ray.exceptions

        self._ray, self._errors = ray, ray.exceptions
        # Not the default strategy: inside a trial of Ray Tune it would ask for the CPU that the trial itself holds.
        self._actor_class = ray.remote(_Worker).options(
            num_cpus=config.num_cpus, num_gpus=config.num_gpus, scheduling_strategy="SPREAD", max_restarts=0
        )
        self._work, self._trust = ray.put(work), trusted()
        self._config, self._name_of = config, name_of
        self._on_news = on_news or (lambda sentence: None)
        self._on_share = on_share or (lambda index, share: None)
        self._items: Sequence[Item] = ()
        self._queue: deque[int] = deque()
        self._waiting: deque[int] = deque()
        self._starting: dict[ObjectRef | Iterator[ObjectRef], ActorHandle] = {}
        self._assigned: dict[ActorHandle, deque[tuple[Iterator[ObjectRef], int]]] = {}
        self._deaths: Counter[int] = Counter()
        self._limit = math.inf if config.max_actors is None else config.max_actors
        self._deaths_in_vain = 0
        self._given_up = ""

    def run(self, items: Sequence[Item]) -> Iterator[tuple[int, Result]]:
        """Yields the index and the result of each item, in the order in which they finish; further items may follow.

        Raises:
            NoResourcesError: No actor could start within `start_timeout`.
            ActorsLostError: Actors died again and again at one item, or none began though CPUs were free.
            Exception: The error that `work` raises.
        """
        self._items, self._queue = items, deque(range(len(items)))
        self._deaths.clear()
        while self._is_busy or (not self._given_up and (self._queue or self._waiting)):
            if not self._given_up:
                self._retry_if_idle()
                self._grow()
                self._hand_out()
            actor, ref = self._next()
            try:
                kind, value = self._ray.get(next(ref) if isinstance(ref, Iterator) else ref)
            except self._errors.RayTaskError as error:
                raise (error.cause or error) from None
            except self._errors.RayError as error:
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
        """Starts an actor. It gets its first item once it is ready, so an actor that waits for room holds none."""
        # Ray's stubs give the class of the actor, which lacks `remote` at its methods.
        actor = cast("ActorHandle", self._actor_class.remote(self._work, self._trust))
        self._starting[actor.ready.remote()] = actor

    def _grow(self) -> None:
        """Adds actors while there are more queued items than starting actors."""
        num_useful = min(_MOST_STARTING, len(self._queue), max(1, self._limit) - len(self._assigned))
        while len(self._starting) < num_useful:
            self._add()

    def _hand_out(self) -> None:
        """Gives one item to each actor, then second ones, so that the last items do not wait behind others."""
        for depth in range(1, self._config.ahead + 1):
            for actor, assigned in self._assigned.items():
                if self._queue and len(assigned) < depth:
                    index = self._queue.popleft()
                    stream = actor.run.options(num_returns="streaming").remote(self._items[index])
                    assigned.append((stream, index))

    def _on_result(self) -> None:
        """Allows one more actor and requeues one waiting item, now that an item has finished."""
        self._limit = min(self._limit + 1, self._config.max_actors or math.inf)
        self._deaths_in_vain = 0
        if self._waiting:
            self._queue.append(self._waiting.popleft())

    def _retry_if_idle(self) -> None:
        """Requeues a waiting item if nothing runs, after a pause, because other processes may have used the memory."""
        has_actors = bool(self._assigned or self._starting)
        if self._is_busy or not self._waiting or (self._queue and has_actors):
            return
        index = self._waiting.pop()
        time.sleep(2 ** self._deaths[index])
        # Other items come first; but if all of them fail, the same one is tried until it is given up.
        put = self._queue.appendleft if self._deaths_in_vain >= _MOST_DEATHS else self._queue.append
        put(index)

    def _next(self) -> tuple[ActorHandle, ObjectRef | Iterator[ObjectRef]]:
        """Waits for an actor to become ready or to yield, and returns the actor and the reference that is ready.

        Raises:
            NoResourcesError, ActorsLostError: No actor has started for a long time.
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
            kind, needed = ("GPU", self._config.num_gpus) if self._config.num_gpus else ("CPU", self._config.num_cpus)
            free, total = (
                resources.get(kind, 0.0)
                for resources in (self._ray.available_resources(), self._ray.cluster_resources())
            )
            now = time.monotonic()
            if free < needed:
                free_since = now
            if not is_said:
                self._on_news(f"waiting for a worker: the cluster has {total:g} {kind}s, {free:g} of them free")
                is_said = True
            if now - begin >= self._config.start_timeout:
                raise NoResourcesError(
                    f"no actor could start within {self._config.start_timeout:g} s: each needs "
                    f"{needed} {kind}s of one node, the cluster has {total:g}, {free:g} of them free; "
                    f"{self._config.room_remedy}"
                )
            if now - free_since > _PATIENCE_SECONDS:
                raise ActorsLostError(
                    f"no worker has begun for {_PATIENCE_SECONDS:g} s, though {free:g} of {total:g} {kind}s are free; "
                    f"{self._config.room_remedy}; see also the logs of Ray"
                )

    def _on_failure(self, actor: ActorHandle, error: Exception) -> None:
        """Requeues a dead actor's items; the first of them, or else the next queued one, waits or is given up."""
        self._queue.extendleft(index for _, index in reversed(self._assigned.pop(actor, deque())))
        # If only its answer was lost, its process may still be alive.
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
        is_memory = isinstance(error, self._errors.OutOfMemoryError)
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
