"""The one training loop: any generator, any of its stages, on any engine."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from raywgen.generators import Generator, Stage, StageConfig
from raywgen.generators.bundle import save_bundle
from raywgen.training.config import TrainConfig
from raywgen.training.data import STAGE_STREAM, BatchOrder
from raywgen.training.engine import Engine
from raywgen.training.runlog import RunLog
from raywgen.weights import KeyedNoise, load_state_dict, save_state_dict

_NUM_INITIAL_BATCHES = 16
_VALIDATION_BATCH = 64
_STATE = "state.safetensors"
_PROGRESS = "progress.json"
BUNDLE = "generator"
STAGES = "stages"
PAUSES = "pauses"

EngineFactory = Callable[[Stage], Engine]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a run is, and all it needs to go on.

    Attributes:
        run: Index of the run in its launch.
        stage: Index of the stage; one past the last when the run is done.
        step: Steps taken in that stage.
        tensors: Generator state under `model.`, optimiser state under `optimizer.`, the stage's own under `stage.`.
    """

    run: int = 0
    stage: int = 0
    step: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def save(self, folder: str | Path) -> None:
        """Writes it without pickles."""
        save_state_dict(self.tensors, Path(folder) / _STATE, {"kind": "raywgen checkpoint"})
        position = {"run": self.run, "stage": self.stage, "step": self.step}
        (Path(folder) / _PROGRESS).write_text(json.dumps(position))

    @classmethod
    def load(cls, folder: str | Path) -> Progress:
        """Reads what `save` wrote."""
        position: dict[str, Any] = json.loads((Path(folder) / _PROGRESS).read_text())
        return cls(**position, tensors=load_state_dict(Path(folder) / _STATE))

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under a prefix, without it."""
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}


class Checkpoints(Protocol):
    """Where progress is kept; every worker calls it, the first one's progress counts."""

    def save(self, progress: Progress) -> None:
        """Keeps it."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """All that one run of a launch needs on a worker."""

    index: int
    config: TrainConfig
    build: Callable[[], Generator]
    order: BatchOrder
    validation: BatchOrder | None
    engine: EngineFactory
    checkpoints: Checkpoints
    rank: int
    facts: dict[str, Any]
    until: float = 1.0


def pause_folder(out: str | Path, until: float) -> Path:
    """Where a run that paused after a share of its last stage leaves its generator and its progress."""
    return Path(out) / PAUSES / f"{until:g}"


def train_run(run: Run, progress: Progress) -> None:
    """Trains all stages that are left, keeping a bundle after each; pauses after a share of the last one."""
    generator = run.build()
    if model := progress.part("model."):
        generator.load_state_dict(model)
    names = [stage.name for stage in generator.stages()]
    done = dict.fromkeys(names[: progress.stage], run.config.log_every + 10**9)
    log = None
    if run.rank == 0:
        resumed = done | ({names[progress.stage]: progress.step} if progress.stage < len(names) else {})
        log = RunLog(run.config.out, resumed)
    for index in range(progress.stage, len(names)):
        stage = generator.stages()[index]
        steps = stage.config.num_steps
        stop = math.ceil(run.until * steps) if index + 1 == len(names) else steps
        begun = progress if index == progress.stage else Progress()
        reached = _train_stage(run, generator, stage, index, begun, stop, log)
        # A fresh generator for the next stage: an engine may leave its hooks on the old one.
        state = generator.state_dict()
        generator = run.build()
        generator.load_state_dict(state)
        if stop < steps:
            if run.rank == 0:
                folder = pause_folder(run.config.out, run.until)
                save_bundle(generator, folder, run.facts)
                reached.save(folder)
            break
        if run.rank == 0:
            save_bundle(generator, Path(run.config.out) / STAGES / stage.name, run.facts)
        run.checkpoints.save(Progress(run=run.index, stage=index + 1, tensors=_model(generator)))
    else:
        if run.rank == 0:
            save_bundle(generator, Path(run.config.out) / BUNDLE, run.facts)
    if log is not None:
        log.close()


def _train_stage(
    run: Run, generator: Generator, stage: Stage, index: int, progress: Progress, stop: int, log: RunLog | None
) -> Progress:
    """Takes the steps before `stop`; returns the last progress that was kept."""
    config = stage.config
    if progress.step == 0:
        initial = (run.order.whole_batch(step, config.batch_size) for step in range(_NUM_INITIAL_BATCHES))
        stage.begin(initial, run.config.seed)
    engine = run.engine(stage)
    if moments := progress.part("optimizer."):
        engine.set_moments(moments)
    stage.set_state(progress.part("stage."), lambda step: run.order.batch(step, config.batch_size))
    for step in range(progress.step, stop):
        batch = run.order.batch(step, config.batch_size)
        noise = KeyedNoise(run.config.seed, batch.sample_index_B, STAGE_STREAM + index)
        # Torch's own generator serves dropout alone; keyed by step, a resumed run draws what it would have drawn.
        torch.manual_seed(hash((run.config.seed, index, step, run.rank)) % 2**63)
        scalars = engine.train_step(batch, noise, learning_rate(config, step))
        _check_finite(scalars, stage, step, run.config)
        last = step + 1 == config.num_steps
        if last or step % run.config.log_every == 0:
            row = {name: float(value) for name, value in scalars.items()}
            row["learning_rate"] = learning_rate(config, step)
            if run.validation is not None and (last or step % run.config.validate_every == 0):
                row |= _validate(run, engine, index)
            if log is not None:
                log.write(stage.name, step, row)
        if ((step + 1) % run.config.checkpoint_every == 0 or step + 1 == stop) and not last:
            kept = {f"optimizer.{name}": tensor for name, tensor in engine.moments().items()}
            kept |= {f"stage.{name}": tensor.cpu() for name, tensor in stage.state(engine.all_reduce).items()}
            progress = Progress(run=run.index, stage=index, step=step + 1, tensors=_model(generator) | kept)
            run.checkpoints.save(progress)
    return progress


def learning_rate(config: StageConfig, step: int) -> float:
    """Linear warm-up, then half a cosine down to a twentieth of the peak."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * step / max(1, config.num_steps)))
    return config.learning_rate * warmup * (0.05 + 0.95 * cosine)


def _model(generator: Generator) -> dict[str, Tensor]:
    return {f"model.{name}": tensor.detach().cpu().clone() for name, tensor in generator.state_dict().items()}


def _validate(run: Run, engine: Engine, index: int) -> dict[str, float]:
    """Mean over one batch per layout of tasks that are never trained on."""
    assert run.validation is not None
    sums: dict[str, float] = {}
    for turn in range(run.validation.num_layouts):
        batch = run.validation.batch(turn, _VALIDATION_BATCH)
        noise = KeyedNoise(run.config.seed + 1, batch.sample_index_B, STAGE_STREAM + index)
        for name, value in engine.evaluate(batch, noise).items():
            sums[f"val_{name}"] = sums.get(f"val_{name}", 0.0) + float(value) / run.validation.num_layouts
    return sums


class DivergedError(RuntimeError):
    """Training gave a loss that is not finite."""


def _check_finite(scalars: dict[str, Tensor], stage: Stage, step: int, config: TrainConfig) -> None:
    if not math.isfinite(float(scalars["loss"])):
        raise DivergedError(
            f"{config.out}: the loss of stage '{stage.name}' is {float(scalars['loss'])} at step {step}; lower "
            f"generator.{stage.name}.learning_rate (now {stage.config.learning_rate})"
        )


class LocalCheckpoints:
    """Keeps the newest progress in a folder; the one before stays until it is whole."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._old = self._folder.with_name(self._folder.name + ".old")

    def save(self, progress: Progress) -> None:
        """Writes beside, then swaps: wherever this is killed, one of the two is there and whole."""
        fresh = self._folder.with_name(self._folder.name + ".new")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        progress.save(fresh)
        if self._folder.is_dir():
            shutil.rmtree(self._old, ignore_errors=True)
            self._folder.rename(self._old)
        fresh.rename(self._folder)
        shutil.rmtree(self._old, ignore_errors=True)

    def load(self, start: str = "") -> Progress:
        """The newest, or that of another run's pause, or a beginning."""
        for folder in (self._folder, self._old):
            if folder.is_dir():
                return Progress.load(folder)
        return Progress.load(start) if start else Progress()
