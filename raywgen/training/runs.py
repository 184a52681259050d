"""What a worker does of a launch: the same, whether it trains alone or beside others."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from raywgen.config import ConfigError, to_yaml
from raywgen.corpus import Corpus
from raywgen.generators import DataSpec, Generator
from raywgen.generators.bundle import BundleError, build_generator, check_bundle
from raywgen.training.checkpoints import CheckpointError, CheckpointWarning, Progress, RunCheckpoints
from raywgen.training.config import TrainConfig
from raywgen.training.data import BatchPlan, RunRows, data_digest
from raywgen.training.loop import BUNDLE, EngineFactory, Run, StopRequest, train_run
from raywgen.weights import NormalizerTable

_VALIDATION_SEED = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """Runs to be trained one after another, as every worker is told them.

    Attributes:
        configs: Of the runs.
        facts: For each run's bundles.
        references: Base and scale of every layout.
        data: Features and classes.
        until: Share of the last stage's steps after which a run pauses.
        start: Pause of another run, from which one without a checkpoint of its own begins.
        snapshot: Of the corpus when the runs were launched; empty for whatever it holds.
    """

    configs: list[TrainConfig]
    facts: list[dict[str, Any]]
    normalizers: NormalizerTable
    data: DataSpec
    until: float = 1.0
    start: str = ""
    snapshot: str = ""

    def build(self, config: TrainConfig) -> Generator:
        """A fresh generator of one of the runs."""
        return build_generator(config.method, config.generator, self.normalizers, self.data, config.seed)


class Worker(Protocol):
    """A process that trains.

    Attributes:
        rank: Its number.
        num_workers: Of how many.
    """

    rank: int
    num_workers: int

    @property
    def stop(self) -> StopRequest:
        """Who may ask it to stop."""
        ...

    def engine(self, config: TrainConfig) -> EngineFactory:
        """What takes the steps of a run."""
        ...

    def agree(self, parts: Mapping[str, str]) -> None:
        """Raises where another worker holds something else."""
        ...


class _NoCheckpoints:
    """What workers but the first one keep."""

    def save(self, progress: Progress) -> None:
        """Keeps nothing."""


def train_all(launch: Launch, worker: Worker, told: Callable[[str], None]) -> None:
    """Trains the runs that are not done yet; ends early where it is asked to stop.

    Args:
        launch: The runs.
        worker: This process.
        told: Called with a sentence for each checkpoint that is passed over.

    Raises:
        ConfigError: A run was begun with other checkpoints than its corpus holds now.
        WorkersDisagreeError: Workers hold different data, settings or versions.
    """
    corpus = Corpus.open(launch.configs[0].corpus, launch.snapshot)
    rows = RunRows.read(corpus)
    digest = data_digest(corpus)
    for config, facts in zip(launch.configs, launch.facts, strict=True):
        build = partial(launch.build, config)
        progress = restore(config, build(), digest, launch.start, told)
        worker.agree(
            {
                "corpus": digest,
                "order of checkpoints": rows.digest(),
                "config": to_yaml(config),
                "version of raywgen or torch": json.dumps(versions()),
                "checkpoint to go on from": json.dumps([config.out, is_done(config), progress.stage, progress.step]),
            }
        )
        if is_done(config):
            continue
        order, validation = _orders(config, build().needs.num_targets, rows, worker)
        run = Run(
            config=config,
            build=build,
            order=order,
            validation=validation,
            engine=worker.engine(config),
            checkpoints=_NoCheckpoints() if worker.rank else RunCheckpoints(config.out),
            rank=worker.rank,
            facts=facts,
            corpus=digest,
            stop=worker.stop,
            until=launch.until,
        )
        if not train_run(run, progress):
            return


def restore(
    config: TrainConfig, generator: Generator, digest: str, start: str, told: Callable[[str], None]
) -> Progress:
    """From where a run goes on: its newest checkpoint that can be used, another run's pause, or its beginning.

    Args:
        config: Of the run.
        generator: A fresh one of the run.
        digest: Of the data, as `data_digest` gives it.
        start: As of `Launch`.
        told: As of `train_all`.

    Raises:
        ConfigError: The corpus holds other checkpoints than it did when the run was begun.
        CheckpointError: `start` cannot be used.
    """
    progress, passed_over = RunCheckpoints(config.out).newest(lambda found: found.check(generator))
    if progress is not None and progress.corpus != digest:
        raise ConfigError(
            f"{config.out} was begun with other checkpoints than {config.corpus} holds now, so it cannot go on with "
            "them; restore the corpus, or give another out"
        )
    if progress is None and start:
        try:
            progress = replace(Progress.load(start), corpus=digest)
            progress.check(generator)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; train the run that paused in {start} again") from error
    progress = progress or Progress(corpus=digest)
    names = [*(stage.name for stage in generator.stages()), "none: all are trained"]
    where = f"step {progress.step} of stage '{names[progress.stage]}'" if progress.tensors else "its beginning"
    for sentence in passed_over:
        told(f"{sentence}; training goes on from {where}")
    return progress


def is_done(config: TrainConfig) -> bool:
    """Whether a run's generator is there and whole; one that is damaged is written again."""
    folder = Path(config.out) / BUNDLE
    if not (folder / "generator.json").exists():
        return False
    try:
        check_bundle(folder)
    except BundleError as error:
        reason = str(error).partition(";")[0]
        warn(f"{reason}; training goes on from the newest checkpoint, and the generator is written again")
        return False
    return True


def versions() -> dict[str, str]:
    """Of what decides the values of a step."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        own = version("raywgen")
    except PackageNotFoundError:
        own = "not installed"
    return {"raywgen": own, "torch": torch.__version__}


def warn(sentence: str) -> None:
    """Tells the user of a checkpoint that is passed over."""
    warnings.warn(sentence, CheckpointWarning, stacklevel=2)


def _orders(config: TrainConfig, num_targets: int, rows: RunRows, worker: Worker) -> tuple[BatchPlan, BatchPlan | None]:
    make = partial(
        BatchPlan,
        num_condition_samples=config.num_condition_samples,
        num_query_samples=config.num_query_samples,
        shot=config.shot,
        num_targets=num_targets,
        rank=worker.rank,
        num_workers=worker.num_workers,
    )
    order = make(rows.train, seed=config.seed)
    return order, make(rows.held, seed=config.seed + _VALIDATION_SEED) if rows.held else None
