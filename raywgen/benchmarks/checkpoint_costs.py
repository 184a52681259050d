"""Measures what checkpoints cost a run: how long a save holds up training, and how much memory it takes.

    checkpoint_stall      share of the time of the steps for which saves hold up training, one process
    save_peak_gib         most anonymous memory that a save adds to a process, in GiB, over all sizes of the group
    save_peak_over_share  likewise, beyond the bytes of the process' own slices, in GiB

The model is a prior of about 50 million parameters on tiny networks, whose steps are short for its size. Sharded groups
of processes (gloo, on the CPU) train under ZeRO-3, and every rank's memory is sampled while it saves.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import tempfile
import time
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.multiprocessing.spawn import spawn

from raywgen.benchmarks.memory_peak import memory_peak
from raywgen.benchmarks.strategy_cases import CASES, Case, batch_of, build_stage, noise_of
from raywgen.training.agreement import exchange
from raywgen.training.checkpoints import Alone, CheckpointManager, Group, TrainState, agree_on_folder, own_slices
from raywgen.training.engine import Engine, EngineSettings, LocalEngine, distributed_engine
from raywgen.training.step_meter import anonymous_bytes

_GIB = 1 << 30
_TIMEOUT = timedelta(minutes=20)
_WARM_UP, _NUM_SAVES = 2, 2
_RATE = 1e-4


@dataclass(kw_only=True)
class CheckpointCostsConfig:
    """The model, and how it is trained.

    Attributes:
        width: Width of the prior.
        num_layers: Layers of the prior.
        batch_size: Networks of a batch.
        save_every: Steps from save to save, where the stall is measured.
        num_workers: Sizes of the groups of processes whose memory is measured.
        folder: Folder of the checkpoints; a temporary one by default.
    """

    width: int = 768
    num_layers: int = 7
    batch_size: int = 32
    save_every: int = 50
    num_workers: list[int] = field(default_factory=lambda: [1, 2, 4])
    folder: str = ""


def measure(config: CheckpointCostsConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Trains in fresh processes, and returns the worst of all."""
    found: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(dir=config.folder or None, prefix="raywgen-costs-") as folder:
        for num in config.num_workers:
            spawn(_work, (num, folder, config), nprocs=num)
            found += [torch.load(f"{folder}/{num}-{rank}", weights_only=True) for rank in range(num)]
    figures = {
        "checkpoint_stall": max((row["stall"] for row in found if "stall" in row), default=0.0),
        "save_peak_gib": max(row["peak_gib"] for row in found),
        "save_peak_over_share": max(row["peak_gib"] - row["share_gib"] for row in found),
    }
    conditions = {
        "processes": [{name: round(value, 4) for name, value in row.items()} for row in found],
        "save_every": config.save_every,
        "zero_stage": 3,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    return {name: round(value, 4) for name, value in figures.items()}, conditions


def _case(config: CheckpointCostsConfig) -> Case:
    case = CASES["igpg-prior"]
    heads = max(1, config.width // 64)
    prior = case.settings["prior"] | {"width": config.width, "num_layers": config.num_layers, "num_heads": heads}
    return replace(case, settings={**case.settings, "prior": prior})


class _Worker:
    """One process of a group."""

    def __init__(self, rank: int, num_workers: int) -> None:
        self.rank, self.num_workers = rank, num_workers

    def exchange(self, text: str) -> list[str]:
        """Returns the texts of all processes."""
        return exchange(text, torch.device("cpu"))


def _work(rank: int, num_workers: int, folder: str, config: CheckpointCostsConfig) -> None:
    torch.set_num_threads(1)
    case, group = _case(config), Alone()
    if num_workers > 1:
        # DeepSpeed reads these even where the group is there already.
        os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(num_workers)}
        os.environ["DS_ACCELERATOR"] = "cpu"
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        store = f"file://{folder}/store-{num_workers}"
        torch.distributed.init_process_group("gloo", store, _TIMEOUT, num_workers, rank)
        group = _Worker(rank, num_workers)
    stage = build_stage(case, config.batch_size)
    settings = EngineSettings(zero_stage=3)
    engine = distributed_engine(stage, num_workers, settings) if num_workers > 1 else LocalEngine(stage)
    out = str(Path(folder) / f"run-{num_workers}")
    run = _Run(engine, case, group, CheckpointManager(out, group, agree_on_folder(out, group)), config.batch_size)
    for _ in range(_WARM_UP):
        run.step()
    row = run.memory_of_saves()
    row |= {"workers": float(num_workers), "parameters": float(run.num_parameters)}
    if num_workers == 1:
        row |= run.stall(config.save_every)
    torch.save(row, f"{folder}/{num_workers}-{rank}")
    if num_workers > 1:
        torch.distributed.destroy_process_group()


@dataclass
class _Run:
    """The training of one process."""

    engine: Engine
    case: Case
    group: Group
    checkpoints: CheckpointManager
    batch_size: int
    num_steps: int = 0

    @property
    def num_parameters(self) -> int:
        parameters = self.engine.stage.parameters()
        return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)

    def step(self) -> float:
        """Takes a step and returns its seconds."""
        batch = batch_of(self.case, self.num_steps, self.batch_size, self.group.rank, self.group.num_workers)
        begin = time.perf_counter()
        self.engine.train_step(batch, noise_of(batch), _RATE, self.batch_size)
        self.num_steps += 1
        return time.perf_counter() - begin

    def save(self) -> float:
        """Begins a save and returns the seconds for which it holds up training."""
        begin = time.perf_counter()
        self.checkpoints.save(TrainState(step=self.num_steps), self.engine.state(self.engine.stage))
        return time.perf_counter() - begin

    def memory_of_saves(self) -> dict[str, float]:
        """Returns the most memory that a save adds, and the bytes of this process' slices."""
        peaks, seconds = [], []
        for _ in range(_NUM_SAVES):
            self.step()
            gc.collect()
            # What steps have freed would hide what a save takes.
            ctypes.CDLL(None).malloc_trim(0)
            before = anonymous_bytes() or 0
            with memory_peak() as most:
                begin = time.perf_counter()
                self.save()
                self.checkpoints.wait()
                seconds.append(time.perf_counter() - begin)
            peaks.append(most() - before)
        own = own_slices(self.engine.state(self.engine.stage), self.group.rank, self.group.num_workers).values()
        share = sum(part.values.numel() * part.values.dtype.itemsize for part in own)
        return {"peak_gib": max(peaks) / _GIB, "share_gib": share / _GIB, "durable_seconds": median(seconds)}

    def stall(self, save_every: int) -> dict[str, float]:
        """Returns the share of time for which saves hold up steps, and the seconds of a step with and without one."""
        saves, quiet, writing = [], [], []
        for _ in range(_NUM_SAVES):
            saves.append(self.save())
            for _ in range(save_every):
                is_writing = self.checkpoints.is_saving
                (writing if is_writing else quiet).append(self.step())
        self.checkpoints.wait()
        # Where a save takes longer than the steps between two, no step above was without one.
        quiet.extend(self.step() for _ in range(save_every))
        return {
            "stall": median(saves) / (save_every * median(quiet)),
            "save_seconds": median(saves),
            "step_seconds": median(quiet),
            "step_seconds_while_writing": median(writing or quiet),
        }
