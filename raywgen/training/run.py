"""Trains one generator as `raywgen train` does: checks first, then Ray if the run asks for workers."""

from __future__ import annotations

from raywgen.training.config import TrainConfig
from raywgen.training.early import check_early
from raywgen.training.launcher import OnProgress, launch
from raywgen.training.session import ray_session
from raywgen.trust import entry_point


@entry_point
def run_training(config: TrainConfig, on_progress: OnProgress | None = None) -> None:
    """Trains a generator; an interrupted run goes on, and one that is done stays as it is.

    Args:
        config: The run; `num_workers=0` trains in this process, without Ray.
        on_progress: Called with every new row of the metric log.

    Raises:
        ConfigError, OutError, CorpusError, DeviceError, ClusterError: The run cannot begin; nothing was started.
        DoesNotFitError, TrainingError, InUseError, Stopped: See `launch`.
    """
    check_early(config)
    launch([config], on_progress, session=ray_session)
