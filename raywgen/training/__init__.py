"""Training generators: launch, worker loop, engines, checkpoints, metrics."""

from raywgen.training.config import TrainConfig
from raywgen.training.launch import launch
from raywgen.training.loop import DivergedError
from raywgen.training.runlog import read_metrics

__all__ = ["DivergedError", "TrainConfig", "launch", "read_metrics"]
