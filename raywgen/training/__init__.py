"""Training generators: launch, worker loop, engines, checkpoints, metrics."""

from raywgen.training.config import TrainConfig
from raywgen.training.launch import TrainingError, launch
from raywgen.training.loop import DivergedError
from raywgen.training.runlog import read_metrics

__all__ = ["DivergedError", "TrainConfig", "TrainingError", "launch", "read_metrics"]
