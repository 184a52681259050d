"""Runs work items: in this process, or over Ray actors, each of which loads the generator once."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from raywgen.actor_pool import ActorPool, OnShare, PoolConfig
from raywgen.generation.config import GenerateConfig
from raywgen.generation.fill import TrainedGenerator
from raywgen.generation.loading import load
from raywgen.generation.plan import GenerationPlan, WorkItem, WorkResult
from raywgen.generation.worker import Worker
from raywgen.generators.bundle import BundleError
from raywgen.nn.devices import Device, DeviceError, resolved_device, say_device


def chosen_device(config: GenerateConfig) -> Literal["cpu", "cuda"]:
    """Returns the kind of device that networks are generated on.

    Raises:
        DeviceError: A GPU is asked for, and this machine, or the Ray cluster, has none.
    """
    if config.where == "here":
        return "cuda" if resolved_device(config.device).type == "cuda" else "cpu"
    if config.device == "cpu":
        return "cpu"
    if is_started_here():
        # Asked of this machine, as Ray may have nothing left to do, and need not be started to say so.
        has_gpus = resolved_device(config.device).type == "cuda"
    else:
        has_gpus = _connected().cluster_resources().get("GPU", 0) > 0
    if config.device == "cuda" and not has_gpus:
        raise DeviceError("device=cuda: the Ray cluster has no GPU; give device=auto or device=cpu, or add one")
    return "cuda" if has_gpus else "cpu"


def say_place(config: GenerateConfig, asked: Device) -> None:
    """Says in one line which device networks are generated on, where `auto` was asked for.

    Args:
        config: The settings, with the chosen device.
        asked: The device that was asked for.
    """
    if config.where == "here":
        say_device(f"{config.out}: generates", asked, resolved_device(config.device))
    elif asked == "auto":
        kind = "GPUs" if config.device == "cuda" else "CPUs"
        print(f"{config.out}: generates on {kind} of Ray", file=sys.stderr, flush=True)


Kept = Callable[[int], Mapping[str, Tensor]]
"""Returns the tensors that the item of that index kept for others, once its result was yielded."""


def execute(
    config: GenerateConfig, plan: GenerationPlan, items: Sequence[WorkItem], trained: TrainedGenerator, kept_of: Kept
) -> Iterator[WorkResult]:
    """Yields the results of work items as they get done, as `config.where` says, on the `chosen_device`.

    Args:
        config: The settings.
        plan: The plan that the items belong to.
        items: The items to do; what they need beside these was done before.
        trained: The generator, for items that are done here.
        kept_of: Returns what an item kept that another one needs.

    Raises:
        NoResourcesError, ActorsLostError: Ray has no room, or actors die again and again.
        Exception: The error that `Worker.run` raises.
    """
    if not items:
        return iter(())
    if config.where == "ray":
        uses_gpus = config.device == "cuda"
        return run_over_ray(plan, items, config.num_actors, config.start_timeout, kept_of, uses_gpus=uses_gpus)
    return run_here(plan, items, trained, kept_of)


def run_here(
    plan: GenerationPlan, items: Sequence[WorkItem], trained: TrainedGenerator, kept_of: Kept
) -> Iterator[WorkResult]:
    """Yields the results of work items, in order."""
    worker = Worker(plan, trained)
    with _threads(plan.threads):
        for item in items:
            yield worker.run(item, _needed(item, kept_of))


def waves(items: Sequence[WorkItem]) -> Iterator[list[WorkItem]]:
    """Yields the items that can be done at once, those that need no other first, then those that need these alone."""
    left = list(items)
    while left:
        waiting = {item.index for item in left}
        ready = [item for item in left if waiting.isdisjoint(item.needs)]
        assert ready, "pieces need earlier ones alone"
        yield ready
        left = [item for item in left if not waiting.isdisjoint(item.needs)]


def run_over_ray(
    plan: GenerationPlan,
    items: Sequence[WorkItem],
    num_actors: int,
    start_timeout: float,
    kept_of: Kept | None = None,
    *,
    uses_gpus: bool = False,
) -> Iterator[WorkResult]:
    """Yields the results of work items in the order in which they are done.

    Two items are with each actor, one under way and one waiting. Pieces that need others begin when these are done.

    Args:
        plan: The plan that the items belong to.
        items: Work items to do.
        num_actors: Number of actors; 0 for one per free core, or per free GPU.
        start_timeout: Seconds to wait for a first actor.
        kept_of: Returns what an item kept that another one needs.
        uses_gpus: Whether each actor takes a GPU.
    """
    free = _connected().available_resources()
    num_free = int(free.get("CPU", 0) // plan.threads)
    if uses_gpus:
        num_free = min(num_free, int(free.get("GPU", 0)))
    pool_config = PoolConfig(
        num_cpus=plan.threads,
        num_gpus=int(uses_gpus),
        max_actors=num_actors or max(1, num_free),
        ahead=2,
        start_timeout=start_timeout,
        death_remedy="lower batch_size or num_actors; see also the logs of Ray",
        room_remedy="wait or add nodes, lower threads, give more time by start_timeout, or generate with where=here",
    )
    pool = ActorPool(
        _RemoteWorker(plan, "cuda" if uses_gpus else "cpu"), pool_config, lambda job: f"work item {job.item.index}"
    )
    try:
        for wave in waves(items):
            shared: dict[int, Mapping[str, Tensor]] = {}

            def kept_once(index: int, shared: dict[int, Mapping[str, Tensor]] = shared) -> Mapping[str, Tensor]:
                assert kept_of is not None
                if index not in shared:
                    shared[index] = kept_of(index)
                return shared[index]

            for _, result in pool.run([_Job(item, _needed(item, kept_once)) for item in wave]):
                yield result
    finally:
        pool.shutdown()


def is_started_here() -> bool:
    """Whether work for Ray would first start it, on this machine."""
    import ray

    return not ray.is_initialized() and not os.environ.get("RAY_ADDRESS")


def _connected() -> Any:
    """Returns Ray, connected to a cluster or started here."""
    import ray

    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    return ray


class _Job(NamedTuple):
    """A work item, with what the items that it needs kept."""

    item: WorkItem
    kept: dict[str, Tensor]


def _needed(item: WorkItem, kept_of: Kept) -> dict[str, Tensor]:
    kept: dict[str, Tensor] = {}
    for index in item.needs:
        kept |= kept_of(index)
    return kept


class _RemoteWorker:
    """A `Worker` in another process.

    The generator is loaded by the first item, not when the object arrives: its errors then reach the user
    unchanged.
    """

    def __init__(self, plan: GenerationPlan, device: Device) -> None:
        self._plan = plan
        self._device: Device = device
        self._worker: Worker | None = None

    def __call__(self, job: _Job, on_share: OnShare) -> WorkResult:
        """Does an item.

        Raises:
            BundleError: This node does not reach the generator.
        """
        with _threads(self._plan.threads):
            if self._worker is None:
                try:
                    self._worker = Worker(self._plan, load(self._plan.generator, device=self._device))
                except BundleError as error:
                    raise BundleError(f"{error} (the generator must lie where every node reaches it)") from error
            return self._worker.run(job.item, job.kept)


@contextmanager
def _threads(num: int) -> Iterator[None]:
    """Sets the number of torch's threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(num)
    try:
        yield
    finally:
        torch.set_num_threads(before)
