"""Blocks over Ray actors, each of which loads the generator once.

A bounded number of blocks is with the actors at any time: two each, one under way and one waiting, so that an actor
never idles and what is written never piles up before it is kept. An actor that dies is replaced, and its blocks go
back to the others; one that waits for resources holds none.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from typing import Any

import torch

from raywgen.generation.loading import load
from raywgen.generation.plan import Block, BlockWriter, Job, Written
from raywgen.generators.bundle import BundleError
from raywgen.trust import trusting

_AHEAD = 2
_MOST_DEATHS = 3
_NO_BLOCK = -1


class NoResourcesError(RuntimeError):
    """The cluster has no room for a single actor; the message says what is asked for and what there is."""


class ActorsLostError(RuntimeError):
    """Actors die again and again, at the same block or before any."""


class WriterActor:
    """A `BlockWriter` in a process of its own.

    The generator is loaded by the first block, not by the constructor: what goes wrong then reaches the user as it is.
    """

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.threads)
        self._job = job
        self._writer: BlockWriter | None = None

    def ready(self) -> None:
        """Returns once the actor is there."""

    def write(self, block: Block) -> Written:
        """As `BlockWriter.write`.

        Raises:
            BundleError: This node does not reach the generator.
        """
        with trusting(*self._job.trust):
            if self._writer is None:
                try:
                    self._writer = BlockWriter(self._job, load(self._job.generator))
                except BundleError as error:
                    raise BundleError(f"{error} (the generator must lie where every node reaches it)") from error
            return self._writer.write(block)


def write_over_ray(blocks: list[Block], job: Job, num_actors: int, start_timeout: float) -> Iterator[Written]:
    """Written blocks in the order in which they are done.

    Args:
        blocks: To write.
        job: What they are blocks of.
        num_actors: 0 for as many as there are free cores.
        start_timeout: Seconds to wait for an actor where there is none.

    Raises:
        NoResourcesError: None could start.
        ActorsLostError: Actors die at the same block again and again.
        Exception: What `BlockWriter` raises.
    """
    import ray

    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    crew = _Crew(job, min(num_actors or _num_free(job), len(blocks)), start_timeout)
    try:
        yield from crew.work(deque(blocks))
    finally:
        crew.dismiss()


def _num_free(job: Job) -> int:
    import ray

    return max(1, int(ray.available_resources().get("CPU", 0) // job.threads))


class _Crew:
    """The actors, and what each of them has to do."""

    def __init__(self, job: Job, num_actors: int, start_timeout: float) -> None:
        import ray

        self._ray: Any = ray
        self._job, self._start_timeout = job, start_timeout
        # No restarts by Ray itself: a restarted actor that finds no room would keep its blocks for ever.
        self._hired: Any = ray.remote(WriterActor).options(num_cpus=job.threads, max_restarts=0)
        self._told = ray.put(job)
        self._starting: dict[Any, Any] = {}
        self._given: dict[Any, deque[tuple[Any, Block]]] = {}
        self._deaths: Counter[int] = Counter()
        for _ in range(num_actors):
            self._hire()

    def work(self, queue: deque[Block]) -> Iterator[Written]:
        while queue or any(self._given.values()):
            self._hand_out(queue)
            owner, ref = self._next()
            try:
                result = self._ray.get(ref)
            except self._ray.exceptions.RayTaskError as error:
                raise (error.cause or error) from None
            except self._ray.exceptions.RayError as error:
                queue.extendleft(reversed(self._bury(owner, error)))
                continue
            if ref in self._starting:
                self._given[self._starting.pop(ref)] = deque()
                self._deaths[_NO_BLOCK] = 0
                continue
            self._given[owner].popleft()
            yield result

    def dismiss(self) -> None:
        for actor in (*self._given, *self._starting.values()):
            self._ray.kill(actor)

    def _hire(self) -> None:
        actor = self._hired.remote(self._told)
        self._starting[actor.ready.remote()] = actor

    def _hand_out(self, queue: deque[Block]) -> None:
        """One block for each, then the second ones: the last blocks should not wait behind others."""
        for depth in range(1, _AHEAD + 1):
            for actor, given in self._given.items():
                if queue and len(given) < depth:
                    block = queue.popleft()
                    given.append((actor.write.remote(block), block))

    def _next(self) -> tuple[Any, Any]:
        """An actor and what it has done: become ready, or the first of its blocks."""
        owners = dict(self._starting) | {given[0][0]: actor for actor, given in self._given.items() if given}
        timeout = None if self._given else self._start_timeout
        (*ready,) = self._ray.wait(list(owners), num_returns=1, timeout=timeout, fetch_local=False)[0]
        if not ready:
            both = (self._ray.cluster_resources(), self._ray.available_resources())
            total, free = (resources.get("CPU", 0) for resources in both)
            raise NoResourcesError(
                f"no actor could start within {self._start_timeout:g} s: each needs {self._job.threads} CPUs of "
                f"one node, the cluster has {total:g}, {free:g} of them free; wait or add nodes, lower threads, give "
                "more time by start_timeout, or write where=here"
            )
        return owners[ready[0]], ready[0]

    def _bury(self, actor: Any, error: Exception) -> list[Block]:
        """Hires another one; the blocks that the dead one leaves.

        Raises:
            ActorsLostError: It is always the same block, or none starts.
        """
        self._starting = {ref: other for ref, other in self._starting.items() if other is not actor}
        given = self._given.pop(actor, deque())
        under_way = given[0][1].index if given else _NO_BLOCK
        self._deaths[under_way] += 1
        if self._deaths[under_way] >= _MOST_DEATHS:
            what = f"at block {under_way}" if given else "before their first block"
            reason = str(error).strip().splitlines()[0]
            raise ActorsLostError(
                f"{_MOST_DEATHS} actors died {what} ({type(error).__name__}: {reason}); where memory is short, lower "
                "block or num_actors; see also the logs of Ray"
            )
        self._ray.kill(actor)  # Its process may live on where only its answer was lost.
        self._hire()
        return [block for _, block in given]
