"""Who trains: this process alone, or Ray Train workers with DeepSpeed."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from raywgen.corpus.storage import absolute
from raywgen.generators import Stage
from raywgen.stops import Stop
from raywgen.training.agreement import check_agreement
from raywgen.training.config import TrainConfig
from raywgen.training.engine import DeepSpeedEngine, Engine, LocalEngine
from raywgen.training.loop import EngineFactory
from raywgen.training.runs import Launch, train_all, warn
from raywgen.trust import trusted, trusting

_RAY = "ray_train"
_STOP = ".stop"
_POLL_SECONDS = 0.5


class TrainingError(RuntimeError):
    """Workers failed more often than `max_failures` allows; the message holds the first one's reason."""


class _Alone:
    """This process."""

    rank, num_workers = 0, 1

    def __init__(self, stop: Stop) -> None:
        self.stop = stop

    def engine(self, config: TrainConfig) -> EngineFactory:
        return partial(LocalEngine, precision=config.precision)

    def agree(self, parts: Mapping[str, str]) -> None:
        """There is nobody to disagree with."""


class _StopFile:
    """Asks workers on all nodes to stop by a file in the run folder, which all of them reach."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._looked = 0.0
        self._is_there = False

    def asked(self) -> bool:
        if not self._is_there and time.monotonic() - self._looked > _POLL_SECONDS:
            self._looked = time.monotonic()
            self._is_there = self._path.exists()
        return self._is_there

    def awaited(self) -> AbstractContextManager[None]:
        return nullcontext()


class _OnRay:
    """A worker of Ray Train."""

    def __init__(self, out: str) -> None:
        import ray.train
        import ray.train.torch

        context = ray.train.get_context()
        self.rank, self.num_workers = context.get_world_rank(), context.get_world_size()
        self.stop = _StopFile(Path(out) / _STOP)
        self._device = ray.train.torch.get_device()
        if self._device.type == "cpu":
            torch.set_num_threads(1)

    def engine(self, config: TrainConfig) -> EngineFactory:
        settings = {"zero_stage": config.zero_stage, "num_workers": self.num_workers, "precision": config.precision}
        return partial(_deepspeed, **settings)

    def agree(self, parts: Mapping[str, str]) -> None:
        check_agreement(parts, self._device)


def _deepspeed(stage: Stage, zero_stage: int, num_workers: int, precision: str) -> Engine:
    return DeepSpeedEngine(stage, zero_stage, num_workers, precision)


def train_here(launch: Launch, stop: Stop) -> None:
    """Trains in this process."""
    train_all(launch, _Alone(stop), warn)


def train_on_ray(launch: Launch, stop: Stop) -> None:
    """Trains on workers of the Ray cluster that this process is connected to.

    Raises:
        TrainingError: Workers failed too often.
    """
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    first = launch.configs[0]
    start = absolute(launch.start) if launch.start else ""
    placed = replace(launch, configs=_placed(launch.configs), start=start)
    trainer = TorchTrainer(
        worker_loop,
        train_loop_config={"launch": placed, "trust": trusted()},
        torch_config=TorchConfig(backend="nccl" if first.use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(num_workers=first.num_workers, use_gpu=first.use_gpu),
        run_config=ray.train.RunConfig(
            name=_RAY,
            storage_path=absolute(first.out),
            failure_config=ray.train.FailureConfig(max_failures=first.max_failures),
        ),
    )
    try:
        _fit(trainer, Path(first.out) / _STOP, stop)
    except ray.train.WorkerGroupError as error:
        first_failure = next(iter(error.worker_failures.values()), error)
        reason = str(first_failure).strip().splitlines()[-1]
        raise TrainingError(
            f"{first.out}: training stopped: {reason}; logs are under {first.out}/{_RAY} and in Ray's session folder, "
            "the same command goes on from the last checkpoint"
        ) from error


def _fit(trainer: Any, flag: Path, stop: Stop) -> None:
    """Runs a trainer while this process looks for signals, and hands on a wish to stop by a file."""
    flag.unlink(missing_ok=True)
    if threading.current_thread() is not threading.main_thread():
        trainer.fit()
        return
    failures: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            failures.append(error)

    # In a thread of its own, as Ray takes over Ctrl-C in the main one and would end without a checkpoint.
    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    try:
        with stop.awaited():
            while thread.is_alive():
                thread.join(_POLL_SECONDS / 2)
                if stop.asked() and not flag.exists():
                    flag.touch()
    finally:
        flag.unlink(missing_ok=True)
    if failures:
        raise failures[0]


def _placed(configs: Sequence[TrainConfig]) -> list[TrainConfig]:
    """With paths that mean the same in a worker, which Ray Train starts in a folder of its own."""
    return [replace(config, corpus=absolute(config.corpus), out=absolute(config.out)) for config in configs]


def worker_loop(told: dict[str, Any]) -> None:
    """What runs on every Ray Train worker; importable, so that it is not pickled by value."""
    launch: Launch = told["launch"]
    # The process that launched has told the user of checkpoints that are passed over.
    with trusting(*told["trust"]):
        train_all(launch, _OnRay(launch.configs[0].out), lambda sentence: None)
