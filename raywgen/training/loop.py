"""The one training loop: any generator, any of its stages, on any engine."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from raywgen.generators import Generator, Stage, StageConfig
from raywgen.generators.bundle import save_bundle
from raywgen.training.checkpoints import Progress
from raywgen.training.config import TrainConfig
from raywgen.training.data import STAGE_STREAM, BatchPlan
from raywgen.training.engine import Engine
from raywgen.training.runlog import RunLog
from raywgen.weights import KeyedNoise

_NUM_INITIAL_BATCHES = 16
_VALIDATION_BATCH = 64
BUNDLE = "generator"
STAGES = "stages"
PAUSES = "pauses"

EngineFactory = Callable[[Stage], Engine]


class Checkpoints(Protocol):
    """Where progress is kept; every worker calls it, the first one's progress counts."""

    def save(self, progress: Progress) -> None:
        """Keeps it."""
        ...


class StopRequest(Protocol):
    """Who may ask a run to stop before its end."""

    def asked(self) -> bool:
        """Whether it is to stop; one worker's yes counts for all."""
        ...

    def awaited(self) -> AbstractContextManager[None]:
        """Around the steps, after each of which `asked` is looked at."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """All that one run of a launch needs on a worker."""

    config: TrainConfig
    build: Callable[[], Generator]
    order: BatchPlan
    validation: BatchPlan | None
    engine: EngineFactory
    checkpoints: Checkpoints
    rank: int
    facts: dict[str, Any]
    corpus: str
    stop: StopRequest
    until: float = 1.0


def pause_folder(out: str | Path, until: float) -> Path:
    """Where a run that paused after a share of its last stage leaves its generator and its progress."""
    return Path(out) / PAUSES / f"{until:g}"


def train_run(run: Run, progress: Progress) -> bool:
    """Trains all stages that are left, keeping a bundle after each; pauses after a share of the last one.

    Returns:
        False where it was asked to stop and is not done; a checkpoint of where it stands is kept.
    """
    generator = run.build()
    if model := progress.part("model."):
        generator.load_state_dict(model)
    names = [stage.name for stage in generator.stages()]
    done = dict.fromkeys(names[: progress.stage], run.config.log_every + 10**9)
    log, is_finished = None, True
    if run.rank == 0:
        resumed = done | ({names[progress.stage]: progress.step} if progress.stage < len(names) else {})
        log = RunLog(run.config.out, resumed)
    for index in range(progress.stage, len(names)):
        stage = generator.stages()[index]
        steps = stage.config.num_steps
        stop = math.ceil(run.until * steps) if index + 1 == len(names) else steps
        begun = progress if index == progress.stage else Progress(corpus=run.corpus)
        reached, is_finished = _train_stage(run, generator, stage, index, begun, stop, log)
        if not is_finished:
            break
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
        run.checkpoints.save(Progress(stage=index + 1, corpus=run.corpus, tensors=_model(generator)))
    else:
        if run.rank == 0:
            save_bundle(generator, Path(run.config.out) / BUNDLE, run.facts)
    if log is not None:
        log.close()
    return is_finished


def _train_stage(
    run: Run, generator: Generator, stage: Stage, index: int, progress: Progress, stop: int, log: RunLog | None
) -> tuple[Progress, bool]:
    """Takes the steps before `stop`, or until it is asked to stop.

    Returns:
        The last progress that was kept, and whether all steps are done.
    """
    config = stage.config
    if progress.step == 0:
        initial = (run.order.whole_batch(step, config.batch_size) for step in range(_NUM_INITIAL_BATCHES))
        stage.setup(initial, run.config.seed)
    engine = run.engine(stage)
    if moments := progress.part("optimizer."):
        engine.set_optimizer_state(moments)
    stage.set_state(progress.part("stage."), lambda step: run.order.batch(step, config.batch_size))
    with run.stop.awaited():
        for step in range(progress.step, stop):
            scalars = _take_step(run, engine, stage, index, step)
            last = step + 1 == config.num_steps
            if last or step % run.config.log_every == 0:
                row = {name: float(value) for name, value in scalars.items()}
                row["learning_rate"] = learning_rate(config, step)
                if run.validation is not None and (last or step % run.config.validate_every == 0):
                    row |= _validate(run, engine, index)
                if log is not None:
                    log.write(stage.name, step, row)
            # What is all but done is finished.
            is_asked = engine.any(run.stop.asked()) and step + 1 < stop
            if ((step + 1) % run.config.checkpoint_every == 0 or step + 1 == stop or is_asked) and not last:
                progress = _progress(run, generator, stage, engine, index, step + 1)
                run.checkpoints.save(progress)
            if is_asked:
                return progress, False
    return progress, True


def _take_step(run: Run, engine: Engine, stage: Stage, index: int, step: int) -> dict[str, Tensor]:
    batch = run.order.batch(step, stage.config.batch_size)
    noise = KeyedNoise(run.config.seed, batch.sample_index_B, STAGE_STREAM + index)
    # Torch's own generator serves dropout alone; keyed by step, a resumed run draws what it would have drawn.
    torch.manual_seed(hash((run.config.seed, index, step, run.rank)) % 2**63)
    scalars = engine.train_step(batch, noise, learning_rate(stage.config, step))
    _check_finite(scalars, stage, step, run.config)
    return scalars


def _progress(run: Run, generator: Generator, stage: Stage, engine: Engine, index: int, step: int) -> Progress:
    """All that is needed to go on; every worker must call it."""
    kept = {f"optimizer.{name}": tensor for name, tensor in engine.moments().items()}
    kept |= {f"stage.{name}": tensor.cpu() for name, tensor in stage.state(engine.all_reduce).items()}
    return Progress(stage=index, step=step, corpus=run.corpus, tensors=_model(generator) | kept)


def learning_rate(config: StageConfig, step: int) -> float:
    """Linear warm-up, then half a cosine down to a twentieth of the peak."""
    warmup = min(1.0, (step + 1) / max(1, config.optimizer.warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * step / max(1, config.num_steps)))
    return config.optimizer.learning_rate * warmup * (0.05 + 0.95 * cosine)


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
            f"generator.{stage.name}.optimizer.learning_rate (now {stage.config.optimizer.learning_rate})"
        )
