"""Runs in forked processes, alone or in groups over gloo: what needs no Ray is broken there, and cheaply.

A fork has all modules loaded, so that a start takes a second and a hundred kills some minutes.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import resource
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from raywgen.benchmarks.chaos_runs import Losses, losses_of
from raywgen.corpus import Corpus
from raywgen.generators import Stage
from raywgen.nn.memory import free_memory
from raywgen.stops import Stop
from raywgen.training import TrainConfig, launch
from raywgen.training.data import data_spec, measure_normalizers
from raywgen.training.engine import Engine, EngineSettings, distributed_engine
from raywgen.training.run_spec import RunSpec
from raywgen.training.stages_file import stage_records, write_stages
from raywgen.training.trainer import train_runs
from raywgen.training.workers import RayContext

_TIMEOUT = timedelta(seconds=60)
_FORK = multiprocessing.get_context("fork")


class GroupContext(RayContext):
    """A worker of a group of forked processes; what it exchanges with the others it does as one of Ray's.

    Args:
        rank: Its number.
        num_workers: Size of the group.
    """

    def __init__(self, rank: int, num_workers: int) -> None:
        self.rank, self.num_workers = rank, num_workers
        self.stop = Stop()
        self.device = torch.device("cpu")

    def engine(self, stage: Stage, settings: EngineSettings) -> Engine:
        """Returns an engine over all workers."""
        return distributed_engine(stage, self.num_workers, settings)

    def memory(self) -> int:
        """Returns the free bytes of this machine."""
        return free_memory(self.device, self.num_workers)

    def is_warned(self) -> bool:
        """Returns False: nobody warns."""
        return False

    def place(self) -> str:
        """Returns the process alone; all workers run here."""
        return f"process {os.getpid()}"


class Group:
    """The processes that train a run.

    Args:
        config: The run.
        num_workers: Processes over gloo; 0 for one alone, by `launch`.
        max_file_bytes: Size beyond which no file can grow, as on a full disk; 0 for none.
        log: File for what they print; by default beside the run folder.
    """

    def __init__(self, config: TrainConfig, num_workers: int, max_file_bytes: int = 0, log: Path | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory()
        log = log or Path(f"{config.out}.log")
        if num_workers == 0:
            work: list[tuple[Callable[..., None], tuple[Any, ...]]] = [(_alone, (config,))]
        else:
            spec = _spec(config, Corpus.open(config.corpus))
            store = f"{self._folder.name}/store"
            work = [(_one_of, (rank, num_workers, store, spec)) for rank in range(num_workers)]
        arguments = [(log, max_file_bytes, *each) for each in work]
        self.processes: list[BaseProcess] = [_FORK.Process(target=_forked, args=each) for each in arguments]
        for process in self.processes:
            process.start()

    def is_over(self) -> bool:
        """Whether all processes have ended."""
        return not any(process.is_alive() for process in self.processes)

    def kill(self) -> None:
        """Kills what is left of the group."""
        for process in self.processes:
            process.kill()
        self.end()

    def end(self) -> bool:
        """Waits for the end of all processes; returns whether all ended well."""
        for process in self.processes:
            process.join()
        self._folder.cleanup()
        return all(process.exitcode == 0 for process in self.processes)


def undisturbed(config: TrainConfig, num_workers: int) -> Losses:
    """Trains a run to its end and returns its losses.

    Raises:
        RuntimeError: It failed.
    """
    if not Group(config, num_workers).end():
        raise RuntimeError(f"the undisturbed run failed; see {config.out}.log")
    return losses_of(Path(config.out))


def _spec(config: TrainConfig, corpus: Corpus) -> RunSpec:
    spec = RunSpec(config=config, metadata={}, normalizers=measure_normalizers(corpus), data=data_spec(corpus))
    Path(config.out).mkdir(parents=True, exist_ok=True)
    write_stages(stage_records(spec.build().stages()), config.out)
    return spec


def _forked(log: Path, max_file_bytes: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    if max_file_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    try:
        work(*arguments)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def _alone(config: TrainConfig) -> None:
    launch([config])


def _one_of(rank: int, num_workers: int, store: str, spec: RunSpec) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(num_workers)}
    os.environ["DS_ACCELERATOR"] = "cpu"
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    torch.distributed.init_process_group("gloo", f"file://{store}", _TIMEOUT, num_workers, rank)
    train_runs([spec], GroupContext(rank, num_workers), lambda sentence: None)
