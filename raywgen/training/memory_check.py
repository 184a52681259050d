"""Whether the stages of a run fit into the memory of its workers, said before anything is trained.

The need is estimated from below, so what is not refused may still fail: the parameters, gradients and moments that each
worker holds, and in stages that run whole networks what a step keeps of these. The process that launches a run compares
it with the memory that the nodes of the cluster declare, and each worker with the memory that is free where it runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from raywgen.generators import Stage
from raywgen.nn.memory import gib, max_min_share
from raywgen.training.config import TrainConfig
from raywgen.training.device_peaks import named_memory
from raywgen.training.engine import Offload
from raywgen.training.resource_check import Nodes, Resources, first_unplaceable, worker_requests
from raywgen.training.strategy import DoesNotFitError, StageSizes, allowed_choices, state_bytes
from raywgen.weights import Layout

# Bytes that are kept for each value of a network where the activations of blocks are computed again.
_MOST_RECOMPUTED = 40.0
_ACCELERATOR = "accelerator_type:"
_DECLARED = ("memory", "object_store_memory")


def check_memory(stages: Sequence[Stage], layouts: Sequence[Layout], config: TrainConfig, memory: int) -> None:
    """Refuses stages that do not fit into memory.

    Args:
        stages: Stages of the run.
        layouts: The layouts of its networks.
        config: The run.
        memory: Bytes of its device that each worker may use.

    Raises:
        DoesNotFitError: A stage does not fit; the message says what it would need, and what to lower.
    """
    num_values = max(layout.num_values for layout in layouts)
    for stage in stages:
        state = least_state_bytes(stage, config)
        if state > memory:
            raise DoesNotFitError(
                f"stage '{stage.name}' of {config.method} does not fit: its parameters, gradients and moments take "
                f"{gib(state)} of a worker, which has {gib(memory)}; give more workers with zero_stage=3, a smaller "
                "generator, or more memory"
            )
        if stage.needs.whole_networks:
            _check_whole_networks(stage, num_values, config, memory - state)


def least_state_bytes(stage: Stage, config: TrainConfig) -> int:
    """Returns the bytes of a worker's device for parameters, gradients and the optimiser's state, without buffers."""
    sizes, num_workers = StageSizes.of_states(stage), max(1, config.min_workers)
    choices: list[tuple[int, Offload]] = [(config.zero_stage if config.min_workers else 0, config.offload)]
    if config.strategy == "auto":
        most = 2 if config.compile else 3
        choices = allowed_choices(config.min_workers, can_offload=config.device == "cuda", max_zero_stage=most)
    return min(state_bytes(sizes, num_workers, *choice) for choice in choices)


def network_bytes(stage: Stage, num_values: int, config: TrainConfig) -> float:
    """Returns the bytes that a step of a stage keeps of a whole network, at least."""
    per_value = stage.bytes_per_value
    if config.activation_checkpointing:
        per_value = min(per_value, _MOST_RECOMPUTED)
    return num_values * (per_value if config.precision == "fp32" else per_value / 2)


def declared_memory(config: TrainConfig, nodes: Nodes) -> int | None:
    """Returns the bytes of its device that each worker can have on a cluster, however the workers are placed.

    A node's memory is what it declares to Ray, the part for objects included, in which training keeps no weights. The
    memory of a GPU is that of the largest of its kind.

    Returns:
        None where a node that workers may be placed on declares no memory, or no GPU that is known, or where nobody
        knows what the cluster may grow to.
    """
    fits = first_unplaceable(worker_requests(config), nodes.alive) is None
    room = nodes.alive if fits else nodes.most
    if room is None:
        return None
    kind = "GPU" if config.device == "cuda" else "CPU"
    places = [(_node_memory(node, kind), int(node.get(kind, 0))) for node in room if node.get(kind, 0) >= 1]
    if not places or any(memory is None for memory, _ in places):
        return None
    known = [(memory, slots) for memory, slots in places if memory is not None]
    if kind == "GPU":  # The workers with the largest GPUs, of which the last one has the least memory.
        largest = sorted((memory for memory, slots in known for _ in range(slots)), reverse=True)
        return largest[: config.min_workers][-1]
    return max_min_share(known, config.min_workers)


def _node_memory(node: Resources, kind: str) -> int | None:
    if kind == "CPU":
        return int(sum(node.get(name, 0.0) for name in _DECLARED)) or None
    names = [name.removeprefix(_ACCELERATOR) for name in node if name.startswith(_ACCELERATOR)]
    return named_memory(names[0]) if len(names) == 1 else None


def _check_whole_networks(stage: Stage, num_values: int, config: TrainConfig, memory: int) -> None:
    num_workers = max(1, config.min_workers)
    each, share = network_bytes(stage, num_values, config), math.ceil(stage.config.batch_size / num_workers)
    at_once = 1 if config.strategy == "auto" else math.ceil(share / config.accumulate)
    if at_once * each <= memory:
        return
    name, fitting = f"generator.{stage.name}", int(memory // each)
    remedies = []
    if 1 <= fitting < share and math.ceil(share / fitting) <= stage.config.batch_size // num_workers:
        remedies.append(f"accumulate={math.ceil(share / fitting)}")
    if fitting:
        remedies.append(f"{name}.batch_size={fitting * num_workers * config.accumulate}")
    if stage.is_optional:
        remedies.append(f"{name}.num_steps=0, which leaves the stage out")
    raise DoesNotFitError(
        f"stage '{stage.name}' of {config.method} runs whole networks: those of {num_values:,} values take at "
        f"least {gib(each)} each, and {at_once} at once ({name}.batch_size={stage.config.batch_size}, "
        f"{_workers(config)}, accumulate={config.accumulate}) {gib(at_once * each)}, but a worker has {gib(memory)} "
        f"beside its parameters and moments; give {', or '.join([*remedies, 'more memory'])}"
    )


def _workers(config: TrainConfig) -> str:
    num_workers = max(1, config.min_workers)
    return "1 worker" if num_workers == 1 else f"{num_workers} workers"
