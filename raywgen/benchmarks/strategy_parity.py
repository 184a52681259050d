"""Whether parallel strategies train alike: ZeRO 0 to 3, with and without accumulation, over several workers.

For each stage of each method the same seeds and batches are trained on in one process by plain torch, and over groups
of processes (gloo, on the CPU) by the engine of each ZeRO stage. The networks of a batch are parted, also unequally.

    grad_rel_diff    | g - g_0 | / | g_0 |, the gradient of the first step against that of one process
    loss_rel_diff    largest | l_t - l_0t | / | l_0t | over all steps; of Reptile's stage, of its inner steps' loss
    resume_rel_diff  likewise, of steps after a run has gone on under another strategy and number of workers

Each is the largest over all strategies and cases.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from raywgen.benchmarks.strategy_cases import CASES, batch_of, build_stage, noise_of
from raywgen.storage import Storage
from raywgen.training.agreement import exchange
from raywgen.training.checkpoints import Alone, Checkpoint, CheckpointManager, Group, TrainState, agree_on_folder
from raywgen.training.engine import Engine, EngineSettings, LocalEngine, distributed_engine, load_parameters
from raywgen.weights import WeightBatch

_TIMEOUT = timedelta(minutes=20)
_BETA = 0.9
# A step of Adam normalises gradients, also those that are rounding alone; below epsilon it does not.
_OPTIMIZER = {"betas": [_BETA, 0.99], "epsilon": 1e-6, "ema_decay": 0.5}
_RATE = 1e-3
_RESULT = "result"
_POLL_SECONDS = 0.5


@dataclass(kw_only=True)
class StrategyParityConfig:
    """The stages that are compared, and the ways to train them.

    Attributes:
        cases: Names of stages, see `strategy_cases`; all by default.
        num_steps: Optimiser steps of each.
        batch_size: Networks of a batch; the default is parted unequally by 2 workers and by 3.
        num_workers: Sizes of the groups of processes.
        zero_stages: ZeRO stages.
        accumulate: Parts of a worker's share.
    """

    cases: list[str] = field(default_factory=lambda: list(CASES))
    num_steps: int = 30
    batch_size: int = 7
    num_workers: list[int] = field(default_factory=lambda: [1, 2, 3])
    zero_stages: list[int] = field(default_factory=lambda: [0, 1, 2, 3])
    accumulate: list[int] = field(default_factory=lambda: [1, 2])

    def __post_init__(self) -> None:
        if unknown := set(self.cases) - set(CASES):
            raise ValueError(f"cases={sorted(unknown)}: give some of {', '.join(CASES)}")
        if self.num_steps < 2:
            raise ValueError(f"num_steps={self.num_steps}: give at least 2, as half of them come after a resumption")
        if self.batch_size < max(self.num_workers) * max(self.accumulate):
            raise ValueError(f"batch_size={self.batch_size}: every part of every worker needs a network")


@dataclass(frozen=True, kw_only=True)
class Job:
    """Steps of one stage under one strategy.

    Attributes:
        case: Name of the stage.
        settings: The strategy.
        steps: First step, and the end of the steps, exclusive.
        batch_size: Networks of a batch.
        out: Folder for losses, the first gradient, and a checkpoint of the middle of the steps.
        start: Folder of a job in whose middle this one begins; empty for the beginning.
    """

    case: str
    settings: EngineSettings
    steps: tuple[int, int]
    batch_size: int
    out: str
    start: str = ""

    @property
    def middle(self) -> int:
        """Number of the step before which the state is saved."""
        return sum(self.steps) // 2


def measure(config: StrategyParityConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Trains every case under every strategy, and compares with one process."""
    with tempfile.TemporaryDirectory() as folder:
        figures = _compare(config, Path(folder))
    return figures, asdict(config) | {"torch": torch.__version__, "device": "cpu", "precision": "fp32"}


def _compare(config: StrategyParityConfig, folder: Path) -> dict[str, float]:
    figures: dict[str, float] = {"grad_rel_diff": 0.0, "loss_rel_diff": 0.0, "resume_rel_diff": 0.0}
    alone = {case: _train_alone(case, config) for case in config.cases}
    before: dict[tuple[str, int], str] = {}
    for num_workers in config.num_workers:
        jobs = _jobs(config, folder / str(num_workers), before)
        for job in _run_jobs(jobs, num_workers):
            result, expected = torch.load(f"{job.out}/{_RESULT}", weights_only=True), alone[job.case]
            losses = zip(result["losses"], expected["losses"][job.steps[0] :], strict=True)
            found = {"resume_rel_diff" if job.start else "loss_rel_diff": max(abs(x - y) / abs(y) for x, y in losses)}
            if not job.start:
                found["grad_rel_diff"] = _difference(result["gradient"], expected["gradient"])
                before[job.case, job.settings.zero_stage] = job.out
            print(_row(job, num_workers, found), flush=True)
            figures |= {name: max(value, figures[name]) for name, value in found.items()}
    return figures


def _jobs(config: StrategyParityConfig, folder: Path, before: dict[tuple[str, int], str]) -> list[Job]:
    """Returns every case under every strategy, and each going on from a run of the group before under another stage."""
    folder.mkdir()
    jobs = []
    for case, zero_stage, accumulate in product(config.cases, config.zero_stages, config.accumulate):
        settings = EngineSettings(zero_stage=zero_stage, accumulate=accumulate, min_sharded=0)
        name = f"{case}-{zero_stage}-{accumulate}"
        common: dict[str, Any] = {"case": case, "settings": settings, "batch_size": config.batch_size}
        jobs.append(Job(**common, steps=(0, config.num_steps), out=str(folder / name)))
        if before and accumulate == config.accumulate[0]:
            places = config.zero_stages
            start = before[case, places[(places.index(zero_stage) + 1) % len(places)]]
            steps = (config.num_steps // 2, config.num_steps)
            jobs.append(Job(**common, steps=steps, out=str(folder / f"{name}-resumed"), start=start))
    return jobs


def _run_jobs(jobs: Sequence[Job], num_workers: int) -> Iterator[Job]:
    """Runs jobs one after another in one group of processes, and yields each as soon as its result is written."""
    left = deque(jobs)
    with tempfile.TemporaryDirectory() as folder:
        group = spawn(_work, (num_workers, folder, list(jobs)), nprocs=num_workers, join=False)
        assert group is not None
        while left:
            is_over = group.join(timeout=_POLL_SECONDS)
            while left and Path(left[0].out, _RESULT).exists():
                yield left.popleft()
            assert not (is_over and left), f"{left[0].case} has no result"
        while not group.join():
            pass


def _work(rank: int, num_workers: int, folder: str, jobs: Sequence[Job]) -> None:
    # DeepSpeed reads these even where the group is there already.
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(num_workers)}
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", store, _TIMEOUT, num_workers, rank)
    for job in jobs:
        engine = _engine(job, rank, num_workers)
        result = _train(engine, job, _Worker(rank, num_workers))
        engine.close()
        if rank == 0:
            torch.save(result, f"{job.out}/{_RESULT}.part")
            os.replace(f"{job.out}/{_RESULT}.part", f"{job.out}/{_RESULT}")
    torch.distributed.destroy_process_group()


def _engine(job: Job, rank: int, num_workers: int) -> Engine:
    """Returns the engine of a job, at the beginning or in the state that it goes on from."""
    case = CASES[job.case]
    stage = build_stage(case, job.batch_size, _OPTIMIZER)
    if not job.start:
        return distributed_engine(stage, num_workers, job.settings)
    stored = Checkpoint.open(Storage.at(f"{job.start}/checkpoints/{TrainState(step=job.steps[0]).folder}"))
    load_parameters(stage, stored, "model.")
    engine = distributed_engine(stage, num_workers, job.settings)
    engine.load(stored)

    def batch_at(step: int) -> WeightBatch:
        batch = batch_of(case, step, job.batch_size, rank, num_workers)
        return stage.see(batch, noise_of(batch))

    stage.set_state(stored.under("stage."), batch_at)
    return engine


def _train_alone(case: str, config: StrategyParityConfig) -> dict[str, Any]:
    engine = LocalEngine(build_stage(CASES[case], config.batch_size, _OPTIMIZER))
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            case=case,
            settings=EngineSettings(),
            steps=(0, config.num_steps),
            batch_size=config.batch_size,
            out=folder,
        )
        return _train(engine, job, Alone())


def _train(engine: Engine, job: Job, group: Group) -> dict[str, Any]:
    case, losses, gradient = CASES[job.case], [], {}
    checkpoints = CheckpointManager(job.out, group, agree_on_folder(job.out, group))
    for step in range(*job.steps):
        if step == job.middle:
            checkpoints.save(TrainState(step=step), engine.state(engine.stage))
        batch = batch_of(case, step, job.batch_size, group.rank, group.num_workers)
        metrics = engine.train_step(batch, noise_of(batch), _RATE, job.batch_size)
        losses.append(float(metrics[case.loss]))
        if step == 0:
            gradient = _gradient(engine, checkpoints)
    checkpoints.wait()
    return {"losses": losses, "gradient": gradient}


def _gradient(engine: Engine, checkpoints: CheckpointManager) -> dict[str, Tensor]:
    """Returns the gradient of the first step, which is in the moments after it, as a checkpoint has them."""
    state = TrainState(step=1)
    checkpoints.save(state, engine.state(engine.stage))
    checkpoints.wait()
    moments = checkpoints.open(state.folder).under("optimizer.")
    return {name: mean / (1 - _BETA) for name, mean in moments.items() if name.endswith("|exp_avg")}


class _Worker:
    """One process of a group."""

    def __init__(self, rank: int, num_workers: int) -> None:
        self.rank, self.num_workers = rank, num_workers

    def exchange(self, text: str) -> list[str]:
        """Returns the texts of all processes."""
        return exchange(text, torch.device("cpu"))


def _difference(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """`| g - g_0 | / | g_0 |` over all parameters."""
    assert mine.keys() == theirs.keys()
    squares = [(float((mine[name] - g).square().sum()), float(g.square().sum())) for name, g in theirs.items()]
    error, size = (sum(column) for column in zip(*squares, strict=True))
    return (error / size) ** 0.5


def _row(job: Job, num_workers: int, found: dict[str, float]) -> str:
    strategy = f"{num_workers} workers, ZeRO-{job.settings.zero_stage}, {job.settings.accumulate} parts"
    return f"{job.case} ({strategy}): " + ", ".join(f"{name} {value:.1e}" for name, value in found.items())
