"""Training generators: launch, worker loop, engines, checkpoints, metrics."""

from raywgen.training.config import TrainConfig
from raywgen.training.launch import launch
from raywgen.training.loop import BUNDLE, DivergedError, pause_folder
from raywgen.training.runlog import read_metrics
from raywgen.training.workers import TrainingError

__all__ = ["BUNDLE", "DivergedError", "TrainConfig", "TrainingError", "launch", "pause_folder", "read_metrics"]
