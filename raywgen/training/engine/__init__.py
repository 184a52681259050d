"""Engines, which take the optimiser steps: plain torch, alone or on every worker, or DeepSpeed over all workers.

All train the same stage with the same losses. What leaves an engine (parameters, averages, the optimiser's state) has
names and is whole, whatever the sharding, so that a checkpoint can be resumed by another number of workers, another
ZeRO stage, or without DeepSpeed.

    base.py        the order of a step, averages of parameters, and what an engine gives and takes
    local.py       plain torch in one process
    replicated.py  torch's DistributedDataParallel, where nothing is sharded
    sharded.py     DeepSpeed ZeRO 1 to 3
"""

from raywgen.generators import Stage
from raywgen.training.engine.base import DeviceMemoryError, Engine, EngineSettings, Offload, load_averages
from raywgen.training.engine.local import LocalEngine
from raywgen.training.engine.replicated import ReplicatedEngine
from raywgen.training.engine.sharded import DeepSpeedEngine

__all__ = [
    "DeepSpeedEngine",
    "DeviceMemoryError",
    "Engine",
    "EngineSettings",
    "LocalEngine",
    "Offload",
    "ReplicatedEngine",
    "distributed_engine",
    "load_averages",
]


def distributed_engine(stage: Stage, num_workers: int, settings: EngineSettings) -> Engine:
    """Returns the engine of a worker of a process group, which is there already, for the ZeRO stage of its settings."""
    kind = DeepSpeedEngine if settings.zero_stage else ReplicatedEngine
    return kind(stage, num_workers, settings)
