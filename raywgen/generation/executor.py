"""Runs work items: in this process, or over Ray actors, each of which loads the generator once."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch

from raywgen.actor_pool import ActorPool, OnShare, PoolConfig
from raywgen.generation.config import GenerateConfig
from raywgen.generation.fill import TrainedGenerator
from raywgen.generation.loading import load
from raywgen.generation.plan import GenerationPlan, WorkItem, WorkResult
from raywgen.generation.worker import Worker
from raywgen.generators.bundle import BundleError
from raywgen.nn.devices import Device, DeviceError, resolved_device, say_device


def chosen_device(config: GenerateConfig) -> Literal["cpu", "cuda"]:
    """Returns the kind of device that networks are generated on; under `auto` it is said in one line.

    Raises:
        DeviceError: A GPU is asked for, and this machine, or the Ray cluster, has none.
    """
    if config.where == "here":
        device = resolved_device(config.device)
        say_device(f"{config.out}: generates", config.device, device)
        return "cuda" if device.type == "cuda" else "cpu"
    if config.device == "cpu":
        return "cpu"
    if _is_started_here():
        # Asked of this machine, as Ray may have nothing left to do, and need not be started to say so.
        has_gpus = resolved_device(config.device).type == "cuda"
    else:
        has_gpus = _connected().cluster_resources().get("GPU", 0) > 0
    if config.device == "cuda" and not has_gpus:
        raise DeviceError("device=cuda: the Ray cluster has no GPU; give device=auto or device=cpu, or add one")
    if config.device == "auto":
        print(f"{config.out}: generates on {'GPUs' if has_gpus else 'CPUs'} of Ray", file=sys.stderr, flush=True)
    return "cuda" if has_gpus else "cpu"


def execute(
    config: GenerateConfig, plan: GenerationPlan, items: Sequence[WorkItem], trained: TrainedGenerator
) -> Iterator[WorkResult]:
    """Yields the results of work items as they get done, as `config.where` says, on the `chosen_device`.

    Raises:
        NoResourcesError, ActorsLostError: Ray has no room, or actors die again and again.
        Exception: The error that `Worker.run` raises.
    """
    if not items:
        return iter(())
    if config.where == "ray":
        uses_gpus = config.device == "cuda"
        return run_over_ray(plan, items, config.num_actors, config.start_timeout, uses_gpus=uses_gpus)
    return run_here(plan, items, trained)


def run_here(plan: GenerationPlan, items: Sequence[WorkItem], trained: TrainedGenerator) -> Iterator[WorkResult]:
    """Yields the results of work items, in order."""
    worker = Worker(plan, trained)
    with _threads(plan.threads):
        for item in items:
            yield worker.run(item)


def run_over_ray(
    plan: GenerationPlan, items: Sequence[WorkItem], num_actors: int, start_timeout: float, *, uses_gpus: bool = False
) -> Iterator[WorkResult]:
    """Yields the results of work items in the order in which they are done.

    Two items are with each actor, one under way and one waiting.

    Args:
        plan: The plan that the items belong to.
        items: Work items to do.
        num_actors: Number of actors; 0 for one per free core, or per free GPU.
        start_timeout: Seconds to wait for a first actor.
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
        _RemoteWorker(plan, "cuda" if uses_gpus else "cpu"), pool_config, lambda item: f"work item {item.index}"
    )
    try:
        for _, result in pool.run(items):
            yield result
    finally:
        pool.shutdown()


def _is_started_here() -> bool:
    """Whether work for Ray would first start it, on this machine."""
    import ray

    return not ray.is_initialized() and not os.environ.get("RAY_ADDRESS")


def _connected() -> Any:
    """Returns Ray, connected to a cluster or started here."""
    import ray

    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    return ray


class _RemoteWorker:
    """A `Worker` in another process.

    The generator is loaded by the first item, not when the object arrives: its errors then reach the user
    unchanged.
    """

    def __init__(self, plan: GenerationPlan, device: Device) -> None:
        self._plan = plan
        self._device: Device = device
        self._worker: Worker | None = None

    def __call__(self, item: WorkItem, on_share: OnShare) -> WorkResult:
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
