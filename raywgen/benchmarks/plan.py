"""Compares plans with runs: the memory of a worker at its peak, and the time of a run from a few measured steps.

    bytes_ratio   bytes of a worker as planned over the most anonymous memory that one had, the worst of all cases
    hours_ratio   time of a run as planned from a few measured steps over the time that it took, likewise

The worst is the ratio farthest from 1, to either side. Every case trains in fresh processes: one alone, or two in a
group (gloo) as Ray Train makes it. Time is that of the first worker's processor, which other programs on the machine do
not lengthen; the same ratio by the clock stands among the conditions.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from raywgen.benchmarks.memory_peak import memory_peak
from raywgen.benchmarks.random_corpus import random_corpus
from raywgen.benchmarks.train_memory import task_corpus
from raywgen.corpus import Corpus
from raywgen.generators import Stage
from raywgen.nn.memory import host_memory
from raywgen.training import trainer
from raywgen.training.config import TrainConfig, load_train_config
from raywgen.training.data import data_spec, measure_normalizers
from raywgen.training.engine import Engine, EngineSettings, LocalEngine, distributed_engine
from raywgen.training.plan import PlanConfig, make_plan
from raywgen.training.plan.hours import run_seconds, short_run, stage_seconds
from raywgen.training.run_spec import RunSpec
from raywgen.training.runlog import Row, RunLog, read_metrics

_TIMEOUT = timedelta(minutes=30)
_GIB = 1 << 30
_CPU = "cpu_seconds"
_PRIOR = [
    "generator.tokenizer={num_steps: 1, batch_size: 8, quantiser: {num_levels: 2, num_codes: 64}}",
    "generator.task_loss.num_steps=0",
]
_MIDDLE = "generator.prior={width: 512, num_layers: 8, num_heads: 8, window: 64, batch_size: 4}"
_LARGE = "generator.prior={width: 768, num_layers: 15, num_heads: 12, window: 48, batch_size: 2}"
_AVERAGED = "generator.prior.optimizer.ema_decay=0.99"
_WINDOWS = [
    "generator.diffusion.num_targets=2",
    "generator.task_loss.num_steps=0",
    "generator.network={kind: chunks, window: 256, width: 256, num_layers: 4, num_heads: 4}",
    "generator.denoiser={meta: joint, batch_size: 8}",
]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run that is planned and trained.

    Attributes:
        method: Its method.
        stage: The stage whose steps are many.
        settings: Its settings.
    """

    method: str
    stage: str
    settings: list[str]


CASES = {
    "local": Case(method="igpg", stage="prior", settings=[*_PRIOR, _MIDDLE, "num_workers=0"]),
    "local-large": Case(method="igpg", stage="prior", settings=[*_PRIOR, _LARGE, "num_workers=0"]),
    "local-windows": Case(method="mcdi", stage="denoiser", settings=[*_WINDOWS, "num_workers=0"]),
    "zero-0": Case(method="igpg", stage="prior", settings=[*_PRIOR, _MIDDLE, "zero_stage=0"]),
    "zero-1": Case(method="igpg", stage="prior", settings=[*_PRIOR, _MIDDLE, "zero_stage=1"]),
    "zero-2": Case(method="igpg", stage="prior", settings=[*_PRIOR, _MIDDLE, "zero_stage=2", _AVERAGED]),
    "zero-3": Case(method="igpg", stage="prior", settings=[*_PRIOR, _MIDDLE, "zero_stage=3"]),
    "zero-1-windows": Case(method="mcdi", stage="denoiser", settings=[*_WINDOWS, "zero_stage=1", "accumulate=2"]),
}


@dataclass(kw_only=True)
class PlanFiguresConfig:
    """The cases, and how many steps they take.

    Attributes:
        cases: Names of cases; all by default.
        measured_steps: Steps from which the time is planned.
        num_steps: Steps of the run that it is compared with.
        network_values: Values of each network of the corpora.
        folder: Folder of corpora and runs; a temporary one by default.
    """

    cases: list[str] = field(default_factory=lambda: list(CASES))
    measured_steps: int = 8
    num_steps: int = 30
    network_values: int = 1_000_000
    folder: str = ""

    def __post_init__(self) -> None:
        if unknown := set(self.cases) - set(CASES):
            raise ValueError(f"cases={sorted(unknown)}: give some of {', '.join(CASES)}")
        if not 6 <= self.measured_steps < self.num_steps:
            raise ValueError(f"measured_steps={self.measured_steps}: give at least 6, and fewer than num_steps")


def measure(config: PlanFiguresConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Plans every case, trains it, and compares."""
    folder = Path(config.folder or tempfile.mkdtemp(prefix="raywgen-plan-"))
    corpora = {"igpg": random_corpus(folder / "random", 8, (config.network_values // 1000, 1000)).location}
    corpora["mcdi"] = task_corpus(folder, 8, config.network_values)
    found = {}
    for name in config.cases:
        found[name] = _compare(CASES[name], corpora[CASES[name].method], folder / name, config)
        print(f"{name}: {found[name]}", flush=True)
    if not config.folder:
        shutil.rmtree(folder)
    figures = {figure: worst([case[figure] for case in found.values()]) for figure in ("bytes_ratio", "hours_ratio")}
    return figures, {"cases": found, "steps": config.num_steps, "cores": os.cpu_count(), "torch": torch.__version__}


def worst(ratios: list[float]) -> float:
    """Returns the ratio that is farthest from 1."""
    return max(ratios, key=lambda ratio: abs(math.log(ratio)))


def _compare(case: Case, corpus: str, out: Path, config: PlanFiguresConfig) -> dict[str, float]:
    run = _run_config(case, corpus, out / "run", config.num_steps)
    few = short_run(run, config.measured_steps, str(out / "few"))
    made = make_plan(run, PlanConfig())
    planned = max(stage.bytes.host for stage in made.stages)
    _train(few)
    peak = _train(run)
    rows, few_rows = read_metrics(run.out), read_metrics(few.out)
    ratios = {
        clock: run_seconds(run, stage_seconds(few_rows, clock)) / _duration(rows, clock) for clock in (_CPU, "time")
    }
    return {
        "parameters": made.generator.num_parameters,
        "planned_gib": round(planned / _GIB, 3),
        "peak_gib": round(peak / _GIB, 3),
        "bytes_ratio": round(planned / peak, 3),
        "hours_ratio": round(ratios[_CPU], 3),
        "hours_ratio_by_clock": round(ratios["time"], 3),
        "seconds": round(_duration(rows, "time"), 1),
    }


def _duration(rows: list[Row], clock: str) -> float:
    return rows[-1][clock]


def _run_config(case: Case, corpus: str, out: Path, num_steps: int) -> TrainConfig:
    settings = [*case.settings, f"generator.{case.stage}.num_steps={num_steps}", "num_condition_samples=8"]
    settings += ["num_query_samples=8", f"checkpoint_every={num_steps}", "validate_every=20", "log_every=1"]
    return load_train_config(case.method, [f"corpus={corpus}", f"out={out}", "device=cpu", *settings])


def _train(config: TrainConfig) -> int:
    """Trains a run in fresh processes, and returns the most anonymous memory that one of them had."""
    num_processes = max(1, config.max_workers)
    with tempfile.TemporaryDirectory() as folder:
        spawn(_work, (num_processes, folder, config), nprocs=num_processes)
        return max(int((Path(folder) / f"peak-{rank}").read_text()) for rank in range(num_processes))


def _work(rank: int, num_workers: int, folder: str, config: TrainConfig) -> None:
    torch.set_num_threads(1)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if num_workers > 1:
        # DeepSpeed reads these even where the group is there already.
        os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(num_workers)}
        os.environ["DS_ACCELERATOR"] = "cpu"
        torch.distributed.init_process_group("gloo", f"file://{folder}/store", _TIMEOUT, num_workers, rank)
    corpus = Corpus.open(config.corpus)
    spec = RunSpec(config=config, metadata={}, normalizers=measure_normalizers(corpus), data=data_spec(corpus))
    trainer.RunLog = _TimedLog
    with memory_peak() as peak:
        trainer.train_runs([spec], _Worker(rank, num_workers), lambda sentence: None)
        (Path(folder) / f"peak-{rank}").write_text(str(peak()))
    if num_workers > 1:
        torch.distributed.destroy_process_group()


class _TimedLog(RunLog):
    """A metric log whose rows hold the seconds of this process' processor too."""

    def __init__(self, folder: str | Path, resumed: Mapping[str, float]) -> None:
        super().__init__(folder, resumed)
        self._cpu_begin = time.process_time()

    def write(self, stage: str, step: int, scalars: dict[str, float], perf: Mapping[str, float] | None = None) -> None:
        """Appends one row."""
        super().write(stage, step, scalars | {_CPU: time.process_time() - self._cpu_begin}, perf)


class _Worker:
    """One of the processes, as the trainer sees it."""

    def __init__(self, rank: int, num_workers: int) -> None:
        self.rank, self.num_workers = rank, num_workers
        self.device, self.stop = torch.device("cpu"), self

    def engine(self, stage: Stage, settings: EngineSettings) -> Engine:
        many = self.num_workers > 1
        return distributed_engine(stage, self.num_workers, settings) if many else LocalEngine(stage, settings)

    def memory(self) -> int:
        return host_memory()

    def is_warned(self) -> bool:
        return False

    def place(self) -> str:
        return f"process {self.rank}"

    def exchange(self, text: str) -> list[str]:
        if self.num_workers == 1:
            return [text]
        texts: list[Any] = [None] * self.num_workers
        torch.distributed.all_gather_object(texts, text)
        return texts

    def share(self, tensors: Iterable[Tensor]) -> None:
        if self.num_workers > 1:
            for tensor in tensors:
                torch.distributed.broadcast(tensor.detach(), 0)

    def check_agreement(self, parts: Mapping[str, str]) -> None:
        pass

    def asked(self) -> bool:
        return False

    def awaited(self) -> AbstractContextManager[None]:
        return nullcontext()
