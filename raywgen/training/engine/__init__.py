"""Engines, which take the optimiser steps: plain torch in this process, or DeepSpeed over all workers.

Both train the same stage with the same losses. What an engine gives to a checkpoint (parameters, averages, the
optimiser's state) are slices with the names and places of the whole, whatever the sharding, so that another number of
workers, another ZeRO stage, or a process without DeepSpeed can go on from it.

    base.py      the order of a step, averages of parameters, and what an engine gives and takes
    local.py     plain torch
    sharded.py   DeepSpeed ZeRO 0 to 3
"""

from raywgen.training.engine.base import DeviceMemoryError, Engine, EngineSettings, Offload, Stored, load_parameters
from raywgen.training.engine.local import LocalEngine
from raywgen.training.engine.sharded import DeepSpeedEngine

__all__ = [
    "DeepSpeedEngine",
    "DeviceMemoryError",
    "Engine",
    "EngineSettings",
    "LocalEngine",
    "Offload",
    "Stored",
    "load_parameters",
]
