"""The nodes that a run is planned for: given by hand, those of a cluster, or this machine."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raywgen.nn.memory import gib, host_memory, max_min_share
from raywgen.training.config import TrainConfig
from raywgen.training.device_peaks import named_memory
from raywgen.training.plan.config import PlanConfig, num_bytes

# The share of a node's memory that Ray sets aside for objects.
_OBJECT_SHARE = 0.3


@dataclass(frozen=True, kw_only=True)
class PlannedNode:
    """A node.

    Attributes:
        cpus: Its CPUs.
        gpus: Its GPUs.
        gpu_memory: Memory of each of them in bytes; None where it is not known.
        memory: Its memory in bytes; None where it is not known.
        object_bytes: Bytes of it that Ray sets aside for objects.
    """

    cpus: int
    gpus: int = 0
    gpu_memory: int | None = None
    memory: int | None = None
    object_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class PlannedNodes:
    """The nodes.

    Attributes:
        nodes: Each of them.
        source: Where they are from, in words.
    """

    nodes: list[PlannedNode]
    source: str

    def describe(self) -> str:
        """Says in words what there is."""
        first, count = self.nodes[0], len(self.nodes)
        memory = f", {gib(first.memory)}" if first.memory else ""
        gpus = f", {first.gpus} GPU of {gib(first.gpu_memory or 0)}" if first.gpus else ""
        alike = "" if all(node == first for node in self.nodes) else " (the first one's)"
        each = " each" if count > 1 else ""
        return (
            f"{count} {'node' if count == 1 else 'nodes'} of {first.cpus} CPU{memory}{gpus}{each}{alike} {self.source}"
        )

    def num_slots(self, device: str, num_reading: int) -> int:
        """Returns the most workers that there is room for beside the CPUs that read the corpus."""
        if device == "cuda":
            return sum(node.gpus for node in self.nodes)
        return max(1, sum(node.cpus for node in self.nodes) - num_reading)

    def device_memory(self, device: str, num_workers: int) -> int | None:
        """Returns the bytes of its device that each worker has; None where that is not known."""
        if device != "cuda":
            return self.host_memory(device, num_workers)
        known = sorted((node.gpu_memory or 0 for node in self.nodes for _ in range(node.gpus)), reverse=True)
        return known[: max(1, num_workers)][-1] or None if known else None

    def host_memory(self, device: str, num_workers: int) -> int | None:
        """Returns the bytes of a node's memory that each worker has, if workers are spread as is best."""
        places = [(node.memory, node.gpus if device == "cuda" else node.cpus) for node in self.nodes]
        if any(memory is None for memory, _ in places):
            return None
        return max_min_share([(memory or 0, slots) for memory, slots in places if slots], max(1, num_workers)) or None

    def num_used(self, device: str, num_workers: int) -> int:
        """Returns how many nodes the workers take."""
        slots = sorted((node.gpus if device == "cuda" else node.cpus for node in self.nodes), reverse=True)
        left, used = max(1, num_workers), 0
        for each in slots:
            if left <= 0:
                break
            left, used = left - each, used + 1
        return used


def planned_nodes(config: TrainConfig, plan: PlanConfig) -> PlannedNodes:
    """Returns the nodes of a plan: those given by hand, else those of `RAY_ADDRESS`, else this machine."""
    if plan.nodes:
        node = PlannedNode(
            cpus=plan.cpus or os.cpu_count() or 1,
            gpus=plan.gpus_per_node,
            gpu_memory=num_bytes(plan.gpu_memory) or None,
            memory=num_bytes(plan.memory) or None,
            object_bytes=int(_OBJECT_SHARE * num_bytes(plan.memory)),
        )
        return PlannedNodes(nodes=[node] * plan.nodes, source="given by hand")
    import ray

    if os.environ.get("RAY_ADDRESS") or ray.is_initialized():
        return _of_cluster()
    return PlannedNodes(nodes=[_this_machine()], source="free on this machine")


def _this_machine() -> PlannedNode:
    gpus = torch.cuda.device_count()
    memory = host_memory() if Path("/proc/meminfo").is_file() else None
    return PlannedNode(
        cpus=os.cpu_count() or 1,
        gpus=gpus,
        gpu_memory=torch.cuda.mem_get_info(0)[1] if gpus else None,
        memory=memory,
        object_bytes=int(_OBJECT_SHARE * (memory or 0)),
    )


def _of_cluster() -> PlannedNodes:
    import ray

    from raywgen.training.session import ray_session

    with ray_session():
        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return PlannedNodes(nodes=[_declared(resources) for resources in alive], source="of the connected cluster")


def _declared(resources: dict[str, Any]) -> PlannedNode:
    kinds = [name.removeprefix("accelerator_type:") for name in resources if name.startswith("accelerator_type:")]
    objects = int(resources.get("object_store_memory", 0))
    return PlannedNode(
        cpus=int(resources.get("CPU", 0)),
        gpus=int(resources.get("GPU", 0)),
        gpu_memory=named_memory(kinds[0]) if len(kinds) == 1 else None,
        memory=int(resources.get("memory", 0)) + objects or None,
        object_bytes=objects,
    )
