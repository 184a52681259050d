"""Trains generators. Begin with `raywgen.training.trainer`: one run from its first step to its last."""

from typing import TYPE_CHECKING

from raywgen.lazy import lazy_names

if TYPE_CHECKING:
    from raywgen.training.config import TrainConfig as TrainConfig
    from raywgen.training.config import load_train_config as load_train_config
    from raywgen.training.engine import DeviceMemoryError as DeviceMemoryError
    from raywgen.training.launcher import launch as launch
    from raywgen.training.run_folder import BUNDLE as BUNDLE
    from raywgen.training.run_folder import snapshot_folder as snapshot_folder
    from raywgen.training.runlog import read_metrics as read_metrics
    from raywgen.training.stages_file import StageRecord as StageRecord
    from raywgen.training.stages_file import read_stages as read_stages
    from raywgen.training.trainer import DivergedError as DivergedError
    from raywgen.training.workers import TrainingError as TrainingError

if not TYPE_CHECKING:  # Type checkers would take any name for one that is there.
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "raywgen.training.config": ["TrainConfig", "load_train_config"],
            "raywgen.training.engine": ["DeviceMemoryError"],
            "raywgen.training.launcher": ["launch"],
            "raywgen.training.run_folder": ["BUNDLE", "snapshot_folder"],
            "raywgen.training.runlog": ["read_metrics"],
            "raywgen.training.stages_file": ["StageRecord", "read_stages"],
            "raywgen.training.trainer": ["DivergedError"],
            "raywgen.training.workers": ["TrainingError"],
        },
    )
