"""Trains generators. Begin with `raywgen.training.trainer`: one run from its first step to its last."""

from raywgen.training.config import TrainConfig, load_train_config
from raywgen.training.engine import DeviceMemoryError
from raywgen.training.launch import launch
from raywgen.training.run_folder import BUNDLE, snapshot_folder
from raywgen.training.runlog import read_metrics
from raywgen.training.stages_file import StageRecord, read_stages
from raywgen.training.trainer import DivergedError
from raywgen.training.workers import TrainingError

__all__ = [
    "BUNDLE",
    "DeviceMemoryError",
    "DivergedError",
    "StageRecord",
    "TrainConfig",
    "TrainingError",
    "launch",
    "load_train_config",
    "read_metrics",
    "read_stages",
    "snapshot_folder",
]
