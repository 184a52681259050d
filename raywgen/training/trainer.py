"""Trains one run: build, resume, step, validate, save. Read this file first.

`Trainer.train` walks through the stages of a generator. Each worker process has a `Trainer` of its own: in step t every
worker takes its part of global batch t, and the engine averages the gradients. Worker 0 alone writes files.

    launch.py     checks a run, locks its folder, starts the workers
    workers.py    what a worker is: this process, or one of Ray Train's
    resume.py     which checkpoint a run goes on from; stage_setup.py prepares a stage before its first step
    batch_plan.py which networks and samples make batch t; prefetch.py draws them ahead
    engine/       forward, backward and the optimiser: plain torch, replicated or not, or DeepSpeed
    checkpoints/  slices of the generator and of the optimiser's state, saved beside training
    runlog.py, run_folder.py    the other files of a run
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace

from torch import Tensor

from raywgen.config import ConfigError, to_yaml
from raywgen.corpus import Corpus
from raywgen.generators import Generator, Stage
from raywgen.generators.bundle import save_bundle
from raywgen.locations import joined
from raywgen.nn.devices import seed_torch
from raywgen.training.batch_plan import STAGE_STREAM, VALIDATION_BATCH, BatchPlan, StageView
from raywgen.training.checkpoints import Checkpoint, CheckpointManager, Part, TrainState, agree_on_folder
from raywgen.training.engine import Engine, load_parameters
from raywgen.training.export import stored_tensors
from raywgen.training.memory_check import check_memory
from raywgen.training.prefetch import Prefetch
from raywgen.training.ray_source import packed_view, ray_reads
from raywgen.training.resume import Warn, resumed_checkpoint, versions
from raywgen.training.rows import LayoutRows, RunRows, data_digest
from raywgen.training.run_folder import BUNDLE, STAGES, is_done
from raywgen.training.run_moments import stage_moments, with_moments
from raywgen.training.run_spec import RunSpec
from raywgen.training.run_tokens import NONE, stage_tokens
from raywgen.training.runlog import RunLog
from raywgen.training.schedule import learning_rate
from raywgen.training.stage_setup import make_engine, set_up
from raywgen.training.step_meter import StepMeter
from raywgen.training.worker_context import WorkerContext
from raywgen.training.workers_log import add_start

_VALIDATION_SEED = 5


class DivergedError(RuntimeError):
    """Training gave a loss that is not finite."""


def train_runs(specs: list[RunSpec], worker: WorkerContext, warn: Warn) -> None:
    """Trains runs on one corpus, one after another; ends early if it is asked to stop.

    Raises:
        ConfigError: A run was begun with other checkpoints than its corpus holds now.
        WorkersDisagreeError: Workers hold different data, settings or versions.
    """
    corpus = Corpus.open(specs[0].config.corpus, specs[0].snapshot, copies=specs[0].config.source != "ray")
    rows, digest = RunRows.of(corpus), data_digest(corpus)
    for spec in specs:
        trainer = Trainer(spec, rows, digest, worker)
        trainer.resume(warn)
        trainer.train()
        if trainer.was_stopped:
            return


@dataclass(frozen=True, slots=True)
class StageRun:
    """The steps of one stage that a launch takes: its engine and number, its batches, and the measure of its speed."""

    engine: Engine
    index: int
    batches: Prefetch
    meter: StepMeter


class Trainer:
    """Trains one run on one worker.

    Args:
        spec: The run.
        rows: The networks of its corpus.
        digest: Digest of the corpus, see `data_digest`.
        worker: This process.

    Attributes:
        state: The position of training; `resume` and every checkpoint replace it.
        was_stopped: Whether training was asked to stop, and did so before its end.
    """

    def __init__(self, spec: RunSpec, rows: RunRows, digest: str, worker: WorkerContext) -> None:
        self.spec, self.config, self.worker = spec, spec.config, worker
        self.is_first = worker.rank == 0
        self._is_on_disk = bool(self.config.max_workers) and self.config.may_shard_parameters
        self.generator = self._build()
        self.stage_names = [stage.name for stage in self.generator.stages()]
        self.state = TrainState(corpus=digest)
        self.was_stopped = False
        self._saved_early = False
        launch = agree_on_folder(self.config.out, worker)
        self.checkpoints = CheckpointManager(self.config.out, worker, launch, self.config.retention())
        self._rows = rows
        self._stored: Checkpoint | None = None  # What this launch, or the stage under way, began from.
        self._validated: Mapping[str, float] = {}
        self._packed_view = b""

    # Resume

    def resume(self, warn: Warn) -> None:
        """Loads the newest usable checkpoint, and checks that all workers found the same run."""
        self._stored = resumed_checkpoint(self.spec, self.generator, self.state.corpus, self.checkpoints, warn)
        if self._stored is not None:
            self.state = replace(self._stored.state, corpus=self.state.corpus)
        self.worker.check_agreement(
            {
                "corpus": self.state.corpus,
                "order of checkpoints": self._rows.digest(),
                "config": to_yaml(self.config),
                "version of raywgen or torch": json.dumps(versions()),
                "checkpoint to go on from": json.dumps(
                    [self.config.out, is_done(self.config.out), self.state.stage, self.state.step]
                ),
            }
        )
        self._log_start()
        if self._stored is not None:
            load_parameters(self.generator, self._stored, "model.")

    def _log_start(self) -> None:
        """Adds this start to the history of the run's workers; every worker must call it."""
        if is_done(self.config.out):
            return
        places, names = self.worker.exchange(self.worker.place()), [*self.stage_names, "all"]
        if self.is_first:
            workers = self.worker.num_workers if self.config.max_workers else 0
            stage = names[self.state.stage]
            add_start(self.config.out, self.spec.launch, workers, stage, self.state.step, places)

    # Train

    def train(self) -> None:
        """Trains the stages that are left, and writes a bundle after each.

        A checkpoint says where training stands if it was asked to stop or reached `stop_at`.

        Raises:
            DoesNotFitError: A stage does not fit into memory.
        """
        if is_done(self.config.out):
            return
        self._check_memory()
        if not self._read_moments():
            self.was_stopped = True
            return
        self.batches, self.validation = self._batch_plans()
        self.log = RunLog(self.config.out, self._rows_to_keep()) if self.is_first else None
        if self.state.stage and not self.state.step:
            self._save_stage_bundle()  # The run may have been killed between the checkpoint and the bundle.
        try:
            is_finished = all(self._train_stage(index) for index in range(self.state.stage, len(self.stage_names)))
            self.checkpoints.wait()
        finally:
            self.checkpoints.close()
        if self.log is not None:
            self.log.close()
        if is_finished:
            self._save_bundle(BUNDLE)

    def _check_memory(self) -> None:
        """Refuses a run with a stage to come that does not fit into a worker's memory; all workers decide alike."""
        is_in_memory = not self._is_on_disk or self.worker.device.type != "cpu"
        held = sum(parameter.nbytes for parameter in self.generator.parameters()) if is_in_memory else 0
        stages = self.generator.stages()[self.state.stage :]
        check_memory(stages, self.generator.layouts, self.config, self.worker.memory() + held)

    def _train_stage(self, index: int) -> bool:
        """Takes the steps of a stage that are left, and saves it; returns whether it is at its end."""
        stage = self.generator.stages()[index]
        engine = self._start_stage(stage, index)
        if stage.tokens != NONE and not self._read_tokens(engine):
            self.was_stopped = True
            return False
        num_steps = stage.config.num_steps
        stop_step = self._stop_step(index, num_steps)
        view = StageView(stage, self.config.seed, STAGE_STREAM + index)
        steps = range(self.state.step, stop_step)
        with ExitStack() as stack:
            stack.enter_context(self.worker.stop.awaited())
            read = stack.enter_context(ray_reads(self.spec, self.batches.order, view, steps, self._packed_view))
            batches = stack.enter_context(
                Prefetch(lambda step: self.batches.for_stage(step, stage.config.batch_size, view, read=read), steps)
            )
            run = StageRun(engine, index, batches, StepMeter(engine))
            for step in steps:
                metrics = self._train_step(run, step)
                is_last = step + 1 == num_steps
                if is_last or step % self.config.log_every == 0 or self._is_scored(step):
                    self._write_row(run, step, metrics)
                # The last step is always followed by the checkpoint after the stage.
                must_stop, must_save = self._requests(engine)
                must_stop = must_stop and step + 1 < stop_step
                is_due = (step + 1) % self.config.save_every == 0 or step + 1 == stop_step or must_stop or must_save
                if is_due and not is_last:
                    state = replace(self.state, stage=index, step=step + 1, metrics=self._validated)
                    self._save(state, engine.state(self.generator))
                if must_stop:
                    self.checkpoints.wait()
                    self.was_stopped = True
                    return False
        if stop_step == num_steps:
            engine.finish()
            self._end_stage(engine, index)
        return stop_step == num_steps

    def _start_stage(self, stage: Stage, index: int) -> Engine:
        """Prepares a stage at its beginning, or as its checkpoint left it."""
        view = StageView(stage, self.config.seed, STAGE_STREAM + index)
        if self.state.step == 0:
            set_up(stage, self.batches, self.config, self.worker)
        if self.config.source == "ray":
            self._packed_view = packed_view(view)
        engine = make_engine(stage, self.batches, self.config, self.worker)
        if self._stored is not None and self.state.step:
            engine.load(self._stored)
        state = self._stored.under("stage.") if self._stored is not None else {}
        stage.set_state(state, lambda step: self.batches.for_stage(step, stage.config.batch_size, view)[0])
        self._validated = self.state.metrics
        self.batches.build_modules(stage)
        return engine

    def _read_moments(self) -> bool:
        """Makes or opens the moments that stages to come need; returns False where a worker was asked to stop."""
        stages = self.generator.stages()[self.state.stage :]
        if not (wanted := stage_moments(stages, self._rows)):
            return True
        corpus = Corpus.open(self.config.corpus, self.spec.snapshot, copies=self.config.source != "ray")
        rows = with_moments(
            self._rows,
            wanted,
            corpus,
            self.spec.normalizers,
            self.config.out,
            rank=self.worker.rank,
            num_workers=self.worker.num_workers,
            asked_to_stop=self.worker.stop.asked,
        )
        if "stop" in self.worker.exchange("stop" if rows is None else "go on") or rows is None:
            return False
        self._rows = rows
        return True

    def _read_tokens(self, engine: Engine) -> bool:
        """Makes or opens the tokens that a stage learns from; returns False where a worker was asked to stop."""
        tokens = stage_tokens(self.spec, engine.stage.tokens, self.generator, self.worker)
        if engine.any(tokens is None) or tokens is None:
            return False
        self._rows = self._rows.with_tokens(tokens)
        self.batches, self.validation = self._batch_plans()
        return True

    def _train_step(self, run: StageRun, step: int) -> dict[str, Tensor]:
        """Takes one optimiser step and returns its metrics, averaged over all workers."""
        stage = run.engine.stage
        with run.meter.waiting():
            batch, noise = run.batches.next()
        # Only dropout uses torch's own generator. Seeding it by step lets a resumed run draw the same masks.
        seed_torch(hash((self.config.seed, run.index, step, self.worker.rank)) % 2**63, self.worker.device)
        with run.meter.step(batch):
            rate = learning_rate(stage.config, step)
            metrics = run.engine.train_step(batch, noise, rate, stage.config.batch_size, self._has_request)
            loss = float(metrics["loss"])
        if not math.isfinite(loss):
            raise DivergedError(
                f"{self.config.out}: the loss of stage '{stage.name}' is {loss} at step {step}; "
                f"lower generator.{stage.name}.optimizer.learning_rate (now {stage.config.optimizer.learning_rate})"
            )
        return metrics

    def _has_request(self) -> bool:
        """Whether this worker has a reason to stop or to save; all workers act on it after the same step."""
        is_warned = self.worker.is_warned() and not self._saved_early
        return self.worker.stop.asked() or is_warned or self.checkpoints.has_failed

    def _requests(self, engine: Engine) -> tuple[bool, bool]:
        """Returns whether all workers stop after this step, and whether they save, as a node will be taken away."""
        if not engine.is_flagged:
            return False, False
        self.checkpoints.wait()  # Raises where a save has failed.
        if engine.any(self.worker.stop.asked()):
            return True, False
        self._saved_early = True  # On all workers, also on those that have yet to learn of it.
        return False, True

    def _stop_step(self, index: int, num_steps: int) -> int:
        """Returns the step at which this launch stops in a stage: its end, or in the last stage `stop_at`."""
        is_last = index + 1 == len(self.stage_names)
        return math.ceil(self.spec.stop_at * num_steps) if is_last else num_steps

    # Validate and log

    def _write_row(self, run: StageRun, step: int, metrics: dict[str, Tensor]) -> None:
        """Logs metrics, with those of a validation when one is due; every worker must call it."""
        stage, perf = run.engine.stage, run.meter.figures()
        row = {name: float(value) for name, value in metrics.items()}
        row["learning_rate"] = learning_rate(stage.config, step)
        is_last = step + 1 == stage.config.num_steps
        is_due = is_last or step % self.config.validate_every == 0 or self._is_scored(step)
        if self.validation is not None and is_due:
            self._validated = self._validate(run, self.validation)
            if self.config.keep_best and self.config.best_metric not in self._validated:
                known = ", ".join(self._validated)
                raise ConfigError(f"best_metric={self.config.best_metric}: stage '{stage.name}' has {known}")
            row |= self._validated
        if self.log is not None:
            self.log.write(stage.name, step, row, perf)

    def _is_scored(self, step: int) -> bool:
        """Whether a checkpoint after this step is compared with others by its validation."""
        return bool(self.config.keep_best) and (step + 1) % self.config.save_every == 0

    def _validate(self, run: StageRun, plan: BatchPlan) -> dict[str, float]:
        """Mean metrics over one batch of each layout, of tasks that are never trained on."""
        sums: dict[str, float] = {}
        view = StageView(run.engine.stage, self.config.seed + 1, STAGE_STREAM + run.index)
        total = max(VALIDATION_BATCH, self.worker.num_workers)
        for turn in range(plan.num_layouts):
            parts = run.batches.aside(plan.parts_for_stage(turn, total, view, run.engine.settings.accumulate))
            for name, value in run.engine.evaluate_parts(parts, total).items():
                sums[f"val_{name}"] = sums.get(f"val_{name}", 0.0) + float(value) / plan.num_layouts
        return sums

    # Save

    def _save(self, state: TrainState, tensors: Mapping[str, Part]) -> None:
        """Saves a checkpoint in the background, once the one before is durable; every worker must call it."""
        self.state = state
        if self.log is not None:
            self.log.copy_soon()  # A run that goes on from here shall find the rows of the steps before.
        self.checkpoints.save(state, tensors)
        # Two saves do not fit into an interval of one step.
        if 2 * self.config.save_every > self.config.checkpoint_every:
            self.checkpoints.wait()

    def _end_stage(self, engine: Engine, index: int) -> None:
        """Saves the generator after a stage, and builds a fresh one: an engine may leave its hooks on the old one."""
        self._save(TrainState(stage=index + 1, corpus=self.state.corpus), engine.parameters_of(self.generator))
        self.checkpoints.wait()
        engine.close()
        self._stored = self.checkpoints.open(self.state.folder)
        self.generator = self._build()
        load_parameters(self.generator, self._stored, "model.")
        self._save_stage_bundle()

    def _save_stage_bundle(self) -> None:
        self._save_bundle(f"{STAGES}/{self.stage_names[self.state.stage - 1]}")

    def _save_bundle(self, name: str) -> None:
        """Writes the generator as it was when the stage under way began, or after the last one."""
        if self.is_first:
            tensors = None if self._stored is None else stored_tensors(self._stored, self.generator)
            save_bundle(self.generator, joined(self.config.out, name), self.spec.metadata, tensors)

    # Build

    def _build(self) -> Generator:
        """Builds a fresh generator on the worker's device; on disk first where parameters may be sharded."""
        return self.spec.build(on_disk=self._is_on_disk).to(self.worker.device)

    def _batch_plans(self) -> tuple[BatchPlan, BatchPlan | None]:
        """The batches to train on, and those to validate on if the corpus has networks for that."""

        def plan(rows: list[LayoutRows], seed: int, augment: str = "") -> BatchPlan:
            return BatchPlan(
                rows,
                seed=seed,
                num_condition_samples=self.config.num_condition_samples,
                num_query_samples=self.config.num_query_samples,
                shot=self.config.shot,
                augment=augment,
                num_targets=self.generator.needs.num_targets,
                rank=self.worker.rank,
                num_workers=self.worker.num_workers,
                device=self.worker.device,
            )

        train = plan(self._rows.train, self.config.seed, self.config.augment)
        return train, plan(self._rows.held, self.config.seed + _VALIDATION_SEED) if self._rows.held else None

    def _rows_to_keep(self) -> dict[str, float]:
        """Stage name -> first step that will be logged again."""
        kept: dict[str, float] = dict.fromkeys(self.stage_names[: self.state.stage], math.inf)
        if self.state.stage < len(self.stage_names):
            kept[self.stage_names[self.state.stage]] = self.state.step
        return kept
