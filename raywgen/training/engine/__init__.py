"""Engines, which take the optimiser steps: plain torch in this process, or DeepSpeed over all workers.

Both train the same stage with the same losses. What leaves an engine (parameters, averages, the optimiser's state) has
names and is whole, whatever the sharding, so that a checkpoint can be resumed by another number of workers, another
ZeRO stage, or without DeepSpeed.

    base.py      the order of a step, averages of parameters, and what an engine gives and takes
    local.py     plain torch
    sharded.py   DeepSpeed ZeRO 0 to 3
"""

from raywgen.training.engine.base import DeviceMemoryError, Engine, EngineSettings, Offload, load_averages
from raywgen.training.engine.local import LocalEngine
from raywgen.training.engine.sharded import DeepSpeedEngine

__all__ = [
    "DeepSpeedEngine",
    "DeviceMemoryError",
    "Engine",
    "EngineSettings",
    "LocalEngine",
    "Offload",
    "load_averages",
]
