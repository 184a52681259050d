"""Breaks runs in every way that is known, and compares each with an undisturbed one.

Runs train by Ray on a simulated cluster of three nodes, whose workers, nodes, raylets and driver are killed or hang,
and which shrinks and grows; and in forked processes, where a kill takes a second: they are killed at random moments,
and their checkpoints damaged.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from raywgen.benchmarks.chaos_cluster_faults import ELASTIC_FAULTS, FAULTS, KILL, break_on_cluster
from raywgen.benchmarks.chaos_process_faults import damage_checkpoints, kill_at_random
from raywgen.benchmarks.chaos_processes import undisturbed
from raywgen.benchmarks.chaos_runs import METHODS, Losses, Outcome, chaos_corpus, run_config
from raywgen.benchmarks.chaos_store import stop_store
from raywgen.training import TrainConfig

_STEPS_PER_FAULT = 60
_WORKERS = 2
_TIMEOUT_SECONDS = 15.0
_RESIZE_SECONDS = 5.0


@dataclass(kw_only=True)
class ChaosConfig:
    """Settings of the benchmark.

    Attributes:
        method: The method with which every fault is tried; with the others a worker is killed.
        interval: Steps between checkpoints, and so the most that a fault may cost.
        kills: Kills at random moments, half of them of one process and half of two that train together.
        cluster: Whether to cause the faults that need a cluster.
        faults: Names of the faults of a cluster to cause; empty for all.
        folder: Folder for the runs, which stay; empty for a temporary one.
        seed: Decides the moments.
    """

    method: str = "igpg"
    interval: int = 10
    kills: int = 40
    cluster: bool = True
    faults: list[str] | None = None
    folder: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method={self.method}: give one of {', '.join(METHODS)}")
        if self.interval < 1 or self.kills < 0:
            raise ValueError("interval must be at least 1, kills at least 0")
        known = [fault.name for fault in (*FAULTS, *ELASTIC_FAULTS)]
        if unknown := sorted({*(self.faults or [])} - {*known}):
            raise ValueError(f"faults: '{unknown[0]}' is none of {', '.join(known)}")


def measure(config: ChaosConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Causes all faults and returns what came of them."""
    torch.set_num_threads(1)  # Forks of a process with a pool of threads would wait for them for ever.
    with _folder(config) as folder:
        corpus = chaos_corpus(folder / "corpus").location
        equal, elastic = _in_processes(config, corpus, folder), list[Outcome]()
        if config.cluster:
            found, elastic = _on_cluster(config, corpus, folder)
            equal += found
    _print(equal + elastic)
    outcomes = equal + elastic
    figures = {
        "faults": float(len(outcomes)),
        "survived": float(sum(outcome.survived for outcome in outcomes)),
        "lost_steps": float(max(outcome.lost_steps for outcome in outcomes)),
        "interval": float(config.interval),
        "loss_diff": max((outcome.difference for outcome in equal), default=0.0),
        "recovery_seconds": max(outcome.seconds for outcome in outcomes),
    }
    if elastic:
        figures["loss_diff_elastic"] = max(outcome.difference for outcome in elastic)
    conditions = {
        "method": config.method,
        "kills_at_random": config.kills,
        "recovery_seconds_of_each": {name: round(seconds, 1) for name, seconds in _seconds(outcomes).items()},
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    return figures, conditions


def _in_processes(config: ChaosConfig, corpus: str, folder: Path) -> list[Outcome]:
    """Kills runs at random moments, and damages checkpoints."""
    rng, outcomes = random.Random(config.seed), list[Outcome]()
    for num_workers, num_kills in ((0, config.kills - config.kills // 2), (_WORKERS, config.kills // 2)):
        run = _run(config, config.method, corpus, folder / f"kills-{num_workers}", num_workers=num_workers)
        wanted = undisturbed(replace(run, out=f"{run.out}-calm"), num_workers)
        if num_kills:
            outcomes += kill_at_random(run, num_workers, num_kills, wanted, rng)
        if num_workers == 0:
            damaged = _run(config, config.method, corpus, folder / "damaged", num_workers=0)
            outcomes += damage_checkpoints(damaged, wanted)
            if find_spec("moto") is not None:  # It is among what tests need, and not among what users install.
                outcomes.append(stop_store(replace(run, out=f"{folder / 'stored'}"), wanted))
    return outcomes


def _on_cluster(config: ChaosConfig, corpus: str, folder: Path) -> tuple[list[Outcome], list[Outcome]]:
    """Breaks runs of a fixed and of a changing number of workers; returns what came of each."""
    chosen = [fault for fault in FAULTS if config.faults is None or fault.name in config.faults]
    scaling = [fault for fault in ELASTIC_FAULTS if config.faults is None or fault.name in config.faults]
    others = [] if config.faults is not None else [method for method in METHODS if method != config.method]
    num_steps = _STEPS_PER_FAULT * (len(FAULTS) + 1)
    common = {"max_failures": 100, "worker_timeout": _TIMEOUT_SECONDS, "resize_seconds": _RESIZE_SECONDS}
    equal: list[Outcome] = []
    elastic: list[Outcome] = []
    if chosen:
        runs = [_run(config, config.method, corpus, folder / "cluster", num_steps, num_workers=_WORKERS, **common)]
        runs += [_run(config, method, corpus, folder / method, num_workers=_WORKERS, **common) for method in others]
        wanted = {run.out: _calm(run) for run in runs}
        equal = break_on_cluster(runs, [chosen, *([KILL] for _ in others)], wanted, config.seed)
    if scaling:
        out = folder / "elastic"
        run = _run(config, config.method, corpus, out, 2 * num_steps, num_workers=[1, 3], **common)
        elastic = break_on_cluster([run], [scaling], {run.out: _calm(run)}, config.seed)
    return equal, elastic


def _run(
    config: ChaosConfig, method: str, corpus: str, out: Path, num_steps: int = 2 * _STEPS_PER_FAULT, **changes: Any
) -> TrainConfig:
    return run_config(method, corpus, out, num_steps, checkpoint_every=config.interval, seed=config.seed, **changes)


def _calm(run: TrainConfig) -> Losses:
    """Trains the same run undisturbed, by as many processes."""
    return undisturbed(replace(run, out=f"{run.out}-calm"), _WORKERS)


def _seconds(outcomes: Sequence[Outcome]) -> dict[str, float]:
    names = list(dict.fromkeys(outcome.name for outcome in outcomes))
    return {name: median(each.seconds for each in outcomes if each.name == name) for name in names}


def _print(outcomes: Sequence[Outcome]) -> None:
    table = Table("fault", "times", "survived", "steps lost, most", "seconds, median", "loss difference, most")
    for name, seconds in _seconds(outcomes).items():
        alike = [outcome for outcome in outcomes if outcome.name == name]
        table.add_row(
            name,
            str(len(alike)),
            str(sum(outcome.survived for outcome in alike)),
            str(max(outcome.lost_steps for outcome in alike)),
            f"{seconds:.1f}",
            f"{max(outcome.difference for outcome in alike):.1e}",
        )
    Console().print(table)


@contextmanager
def _folder(config: ChaosConfig) -> Iterator[Path]:
    if config.folder:
        Path(config.folder).mkdir(parents=True, exist_ok=True)
        yield Path(config.folder)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
