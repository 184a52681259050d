"""Lets the trainer and a bare PyTorch loop take turns, step by step, on the same model and batches.

The bare loop takes its step when the trainer begins the next one, or ends the stage: the trainer's turn is all that it
does from one step to the next. Its prefetch thread has drawn its batches by then, so it does not work while the bare
loop is measured.
"""

from __future__ import annotations

import copy
import logging
import os
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from raywgen.corpus import Corpus
from raywgen.generators import Stage
from raywgen.nn.memory import host_memory
from raywgen.training.agreement import exchange, share
from raywgen.training.batch_plan import STAGE_STREAM, BatchPlan, StageView
from raywgen.training.engine import Engine, EngineSettings, LocalEngine, distributed_engine
from raywgen.training.rows import RunRows, data_digest
from raywgen.training.run_spec import RunSpec
from raywgen.training.schedule import learning_rate
from raywgen.training.trainer import StageRun, Trainer

_TIMEOUT = timedelta(minutes=20)
# Two workers add in another order than DistributedDataParallel; one process must give the very same losses.
_MAX_LOSS_DIFF = 1e-3


@dataclass(kw_only=True)
class Times:
    """Seconds of each step of the last stage, on the clock and of the processor."""

    trainer: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)
    trainer_cpu: list[float] = field(default_factory=list)
    bare_cpu: list[float] = field(default_factory=list)
    loss_rel_diff: float = 0.0


def train_in_turns(spec: RunSpec, num_processes: int) -> Times:
    """Trains a run in fresh processes and returns the times of the first one."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_work, (num_processes, folder, spec), nprocs=num_processes)
        return torch.load(f"{folder}/times", weights_only=False)


def _work(rank: int, num_workers: int, folder: str, spec: RunSpec) -> None:
    torch.set_num_threads(1)
    if num_workers > 1:
        # DeepSpeed reads these even where the group is there already.
        os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(num_workers)}
        os.environ["DS_ACCELERATOR"] = "cpu"
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        torch.distributed.init_process_group("gloo", f"file://{folder}/store", _TIMEOUT, num_workers, rank)
    corpus, worker = Corpus.open(spec.config.corpus), _TurnTaking(spec, rank, num_workers)
    _TurnTakingTrainer(spec, RunRows.of(corpus), data_digest(corpus), worker).train()
    if rank == 0:
        torch.save(worker.times, Path(folder) / "times")
    if num_workers > 1:
        torch.distributed.destroy_process_group()


class _TurnTaking:
    """A worker whose engine takes turns with a bare loop."""

    def __init__(self, spec: RunSpec, rank: int, num_workers: int) -> None:
        self.spec, self.rank, self.num_workers = spec, rank, num_workers
        self.stop = self
        self.device = torch.device("cpu")
        self.times = Times()
        self._loss: Tensor | None = None
        self._began: tuple[float, float] | None = None

    def memory(self) -> int:
        return host_memory()

    def is_warned(self) -> bool:
        return False

    def place(self) -> str:
        return ""

    def exchange(self, text: str) -> list[str]:
        return exchange(text, self.device) if self.num_workers > 1 else [text]

    def share(self, tensors: Iterable[Tensor]) -> None:
        if self.num_workers > 1:
            share(tensors)

    def check_agreement(self, parts: Mapping[str, str]) -> None:
        pass

    def awaited(self) -> AbstractContextManager[None]:
        return nullcontext()

    def engine(self, stage: Stage, settings: EngineSettings) -> Engine:
        """Returns the trainer's engine, and makes the bare loop of the same stage."""
        index = [one.name for one in self.spec.build().stages()].index(stage.name)
        self._bare = _BareLoop(copy.deepcopy(stage), self._plan(), StageView(stage, self.spec.config.seed, 0), index)
        many = self.num_workers > 1
        engine = distributed_engine(stage, self.num_workers, settings) if many else LocalEngine(stage, settings)
        self.times, self._loss, self._began = Times(), None, None
        return engine

    def _plan(self) -> BatchPlan:
        """The same batches from rows of their own, as the trainer's are read by its thread."""
        config = self.spec.config
        return BatchPlan(
            RunRows.of(Corpus.open(config.corpus)).train,
            seed=config.seed,
            num_condition_samples=config.num_condition_samples,
            num_query_samples=config.num_query_samples,
            rank=self.rank,
            num_workers=self.num_workers,
        )

    def asked(self) -> bool:
        return False

    def end_turn(self) -> None:
        """Ends the trainer's turn, if it has taken a step, and lets the bare loop take the same step."""
        if self._began is not None and self._loss is not None:
            times, (wall, cpu) = self.times, self._began
            times.trainer.append(time.perf_counter() - wall)
            times.trainer_cpu.append(time.process_time() - cpu)
            self._take_bare_step(times, float(self._loss))
        self._began = time.perf_counter(), time.process_time()

    def note(self, metrics: Mapping[str, Tensor]) -> None:
        """Keeps the loss of the trainer's step for the comparison."""
        self._loss = metrics["loss"]

    def _take_bare_step(self, times: Times, found: float) -> None:
        loss = self._bare.step(times)
        if self.num_workers > 1:
            whole = torch.tensor(loss)
            torch.distributed.all_reduce(whole)
            loss = float(whole) / self.num_workers
        difference = abs(found - loss) / abs(loss)
        limit = _MAX_LOSS_DIFF if self.num_workers > 1 else 0.0
        assert difference <= limit, f"the losses are {found} through the trainer and {loss} of the bare loop"
        times.loss_rel_diff = max(times.loss_rel_diff, difference)


class _TurnTakingTrainer(Trainer):
    """A trainer that ends its turn before it asks for the batch of its next step."""

    def __init__(self, spec: RunSpec, rows: RunRows, digest: str, worker: _TurnTaking) -> None:
        super().__init__(spec, rows, digest, worker)
        self._turns = worker

    def _train_step(self, run: StageRun, step: int) -> dict[str, Tensor]:
        self._turns.end_turn()
        metrics = super()._train_step(run, step)
        self._turns.note(metrics)
        return metrics

    def _end_stage(self, engine: Engine, index: int) -> None:
        self._turns.end_turn()
        super()._end_stage(engine, index)


class _BareLoop:
    """Plain PyTorch: forward, backward, clipping and AdamW on batches that are there before the step."""

    def __init__(self, stage: Stage, plan: BatchPlan, view: StageView, index: int) -> None:
        self._stage, config = stage, stage.config
        seen = StageView(stage, view.seed, STAGE_STREAM + index)
        self._batches = [plan.for_stage(step, config.batch_size, seen) for step in range(config.num_steps)]
        is_many = torch.distributed.is_initialized()
        self._model: nn.Module = DistributedDataParallel(stage) if is_many else stage
        optimizer = config.optimizer
        self._optimizer = torch.optim.AdamW(
            stage.parameters(),
            lr=optimizer.learning_rate,
            betas=optimizer.betas,
            eps=optimizer.epsilon,
            weight_decay=optimizer.weight_decay,
        )

    def step(self, times: Times) -> float:
        """Takes the next step and returns its loss."""
        number = len(times.bare)
        batch, noise = self._batches[number]
        self._stage.train()
        wall, cpu = time.perf_counter(), time.process_time()
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self._stage.config, number)
        self._optimizer.zero_grad()
        loss = self._model(batch, noise).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self._stage.parameters(), self._stage.config.optimizer.grad_clip)
        self._optimizer.step()
        value = float(loss.detach())
        times.bare.append(time.perf_counter() - wall)
        times.bare_cpu.append(time.process_time() - cpu)
        self._stage.after_step(lambda tensor: tensor)
        return value
