"""Runs work items: in this process, or over Ray actors, each of which loads the generator once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from raywgen.actor_pool import ActorPool, OnShare, PoolConfig
from raywgen.generation.config import GenerateConfig
from raywgen.generation.fill import TrainedGenerator
from raywgen.generation.loading import load
from raywgen.generation.plan import GenerationPlan, WorkItem, WorkResult
from raywgen.generation.worker import Worker
from raywgen.generators.bundle import BundleError


def execute(
    config: GenerateConfig, plan: GenerationPlan, items: Sequence[WorkItem], trained: TrainedGenerator
) -> Iterator[WorkResult]:
    """Yields the results of work items as they get done, as `config.where` says.

    Raises:
        NoResourcesError, ActorsLostError: Ray has no room, or actors die again and again.
        Exception: What `Worker.run` raises.
    """
    if not items:
        return iter(())
    if config.where == "ray":
        return run_over_ray(plan, items, config.num_actors, config.start_timeout)
    return run_here(plan, items, trained)


def run_here(plan: GenerationPlan, items: Sequence[WorkItem], trained: TrainedGenerator) -> Iterator[WorkResult]:
    """Yields the results of work items, in order."""
    worker = Worker(plan, trained)
    with _threads(plan.threads):
        for item in items:
            yield worker.run(item)


def run_over_ray(
    plan: GenerationPlan, items: Sequence[WorkItem], num_actors: int, start_timeout: float
) -> Iterator[WorkResult]:
    """Yields the results of work items in the order in which they are done.

    Two items are with each actor, one under way and one waiting.

    Args:
        plan: The plan that the items belong to.
        items: Work items to do.
        num_actors: Number of actors; 0 for one per free core.
        start_timeout: Seconds to wait for a first actor.
    """
    import ray

    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    num_free = max(1, int(ray.available_resources().get("CPU", 0) // plan.threads))
    pool_config = PoolConfig(
        num_cpus=plan.threads,
        max_actors=num_actors or num_free,
        ahead=2,
        start_timeout=start_timeout,
        death_remedy="lower batch_size or num_actors; see also the logs of Ray",
        room_remedy="wait or add nodes, lower threads, give more time by start_timeout, or generate with where=here",
    )
    pool = ActorPool(_RemoteWorker(plan), pool_config, lambda item: f"work item {item.index}")
    try:
        for _, result in pool.run(items):
            yield result
    finally:
        pool.shutdown()


class _RemoteWorker:
    """A `Worker` in another process.

    The generator is loaded by the first item, not when the object arrives: its errors then reach the user
    unchanged.
    """

    def __init__(self, plan: GenerationPlan) -> None:
        self._plan = plan
        self._worker: Worker | None = None

    def __call__(self, item: WorkItem, on_share: OnShare) -> WorkResult:
        """Does an item.

        Raises:
            BundleError: This node does not reach the generator.
        """
        with _threads(self._plan.threads):
            if self._worker is None:
                try:
                    self._worker = Worker(self._plan, load(self._plan.generator))
                except BundleError as error:
                    raise BundleError(f"{error} (the generator must lie where every node reaches it)") from error
            return self._worker.run(item)


@contextmanager
def _threads(num: int) -> Iterator[None]:
    """Sets the number of torch's threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(num)
    try:
        yield
    finally:
        torch.set_num_threads(before)
