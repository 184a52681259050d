"""Engines, which take the optimiser steps: plain torch, alone or on every worker, or DeepSpeed over all workers.

All train the same stage with the same losses. What an engine gives to a checkpoint (parameters, averages, the
optimiser's state) are slices with the names and places of the whole, whatever the sharding, so that another number of
workers, another ZeRO stage, or a process without DeepSpeed can go on from it.

    base.py             the order of a step, averages of parameters, and what an engine gives and takes
    optimizer_state.py  the optimiser, and its state as a checkpoint holds it
    local.py            plain torch in one process
    replicated.py       torch's DistributedDataParallel, where nothing is sharded
    sharded.py          DeepSpeed ZeRO 1 to 3
"""

from raywgen.generators import Stage
from raywgen.training.engine.base import (
    MAX_BUCKET,
    DeviceMemoryError,
    Engine,
    EngineSettings,
    Offload,
)
from raywgen.training.engine.local import LocalEngine
from raywgen.training.engine.optimizer_state import Stored, load_parameters
from raywgen.training.engine.replicated import ReplicatedEngine
from raywgen.training.engine.sharded import DeepSpeedEngine

__all__ = [
    "MAX_BUCKET",
    "DeepSpeedEngine",
    "DeviceMemoryError",
    "Engine",
    "EngineSettings",
    "LocalEngine",
    "Offload",
    "ReplicatedEngine",
    "Stored",
    "distributed_engine",
    "load_parameters",
]


def distributed_engine(stage: Stage, num_workers: int, settings: EngineSettings) -> Engine:
    """Returns the engine of a worker of a process group, which is there already, for the ZeRO stage of its settings."""
    kind = DeepSpeedEngine if settings.zero_stage else ReplicatedEngine
    return kind(stage, num_workers, settings)
