"""Measures what the trainer costs beside the computation: overhead of a step, waiting for input, and start-up.

    overhead_1       step time through the trainer over a bare PyTorch loop of the same model and data, minus 1
    overhead_2       likewise, of two processes (gloo) that shard nothing, over bare `DistributedDataParallel`
    overhead_2_zero  likewise, of two processes under DeepSpeed ZeRO
    input_wait       share of the steps' time spent waiting for batches of a mapped corpus, by default four times larger
                     than a limit on the worker's private memory (`RLIMIT_DATA`)
    token_speedup    step time of a prior that encodes windows of weights over that of one on stored tokens
    token_ratio      bytes of the corpus over those of its tokens
    checkpoint_stall, save_peak_gib, save_peak_over_share    see `checkpoint_costs`
    startup_seconds  from the start of a process to the end of the first step on two workers of Ray Train, the setup
                     of its stage included, such as k-means for codebooks

Trainer and bare loop take turns step by step in the same processes, and every loss of the one is compared with that of
the other before its time counts.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from raywgen.benchmarks import checkpoint_costs
from raywgen.benchmarks.checkpoint_costs import CheckpointCostsConfig
from raywgen.benchmarks.random_corpus import random_corpus
from raywgen.benchmarks.token_steps import token_figures
from raywgen.benchmarks.trainer_turns import Times, train_in_turns
from raywgen.corpus import Corpus
from raywgen.stops import Stop
from raywgen.training import TrainConfig, launch, load_train_config, read_metrics
from raywgen.training.data import data_spec, measure_normalizers
from raywgen.training.run_folder import BUNDLE
from raywgen.training.run_spec import RunSpec
from raywgen.training.runlog import TENSORBOARD
from raywgen.training.session import ray_session
from raywgen.training.stages_file import STAGES_FILE
from raywgen.training.workers import train_here

_GIB = 1 << 30
_WARM_UP = 2
_COLUMNS = 1000
_LOG_EVERY = 10


@dataclass(kw_only=True)
class TrainOverheadConfig:
    """The model and the corpora.

    Attributes:
        num_networks: Networks of the corpus for overhead and start-up.
        num_values: Values of each network.
        width: Width of the prior.
        num_layers: Layers of the prior.
        window: Chunks that the prior sees.
        batch_size: Networks of a batch.
        num_steps: Steps of a measurement; figures are medians over blocks of 10 steps, each with one row of the log.
        zero_stage: DeepSpeed ZeRO stage of `overhead_2_zero`.
        limit_gib: Limit on the private memory of the worker whose waiting is measured.
        large_values: Values of each network of its corpus.
        over_limit: Size of its corpus over the limit.
        startup: Whether start-up on workers of Ray is measured.
        checkpoints: Whether the costs of checkpoints are measured.
        folder: Folder of corpora and runs; a temporary one by default.
    """

    num_networks: int = 16
    num_values: int = 1_000_000
    width: int = 128
    num_layers: int = 3
    window: int = 128
    batch_size: int = 8
    num_steps: int = 62
    zero_stage: int = 1
    limit_gib: float = 1.0
    large_values: int = 10_000_000
    over_limit: float = 4.0
    startup: bool = True
    checkpoints: bool = True
    folder: str = ""

    def __post_init__(self) -> None:
        if self.num_steps < _WARM_UP + _LOG_EVERY:
            raise ValueError(f"num_steps={self.num_steps}: give at least {_WARM_UP + _LOG_EVERY}")


def measure(config: TrainOverheadConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Makes the corpora, and measures one thing after another."""
    folder = Path(config.folder or tempfile.mkdtemp(prefix="raywgen-overhead-"))
    small = random_corpus(folder / "small", config.num_networks, _shape(config.num_values))
    figures: dict[str, float] = {}
    conditions: dict[str, Any] = {}
    for name, num_processes, zero_stage in (("1", 1, 0), ("2", 2, 0), ("2_zero", 2, config.zero_stage)):
        times = train_in_turns(_spec(config, small, folder / f"run-{name}", zero_stage=zero_stage), num_processes)
        figures[f"overhead_{name}"] = _overhead(times.trainer, times.bare)
        conditions[f"processes_{name}"] = _conditions(times)
        print(f"overhead_{name}: {figures[f'overhead_{name}']:.4f}, {conditions[f'processes_{name}']}", flush=True)
    wait_figures, conditions["input"] = _input_wait(config, folder)
    figures |= wait_figures
    print(f"input_wait: {figures['input_wait']:.4f}, {conditions['input']}", flush=True)
    if config.startup:
        conditions["startup"] = _startup(config, small, folder / "startup")
        figures["startup_seconds"] = sum(conditions["startup"].values())
        print(f"startup_seconds: {figures['startup_seconds']:.1f}, {conditions['startup']}", flush=True)
    run = _run_config(config, small.location, folder / "tokens-run")
    if config.checkpoints:
        costs, conditions["checkpoints"] = checkpoint_costs.measure(CheckpointCostsConfig(folder=str(folder)))
        figures |= costs
    figures |= token_figures(run, small, folder / "run-1" / BUNDLE, folder / "tokens", config.num_steps)
    if not config.folder:
        shutil.rmtree(folder)
    conditions |= {
        "steps": config.num_steps,
        "batch_size": config.batch_size,
        "zero_stage": config.zero_stage,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    return {name: round(value, 4) for name, value in figures.items()}, conditions


def _shape(num_values: int) -> tuple[int, int]:
    return num_values // _COLUMNS, _COLUMNS


def _spec(config: TrainOverheadConfig, corpus: Corpus, out: Path, **changes: int) -> RunSpec:
    """A run of IGPG whose last stage, the prior, is measured."""
    shutil.rmtree(out, ignore_errors=True)
    run = _run_config(config, corpus.location, out, **changes)
    return RunSpec(config=run, metadata={}, normalizers=measure_normalizers(corpus), data=data_spec(corpus))


def _run_config(config: TrainOverheadConfig, corpus: str, out: Path, **changes: int) -> TrainConfig:
    settings = {
        "generator.tokenizer.num_steps": 1,
        "generator.tokenizer.batch_size": 8,
        "generator.task_loss.num_steps": 0,
        "generator.prior.num_steps": config.num_steps,
        "generator.prior.batch_size": config.batch_size,
        "generator.prior.width": config.width,
        "generator.prior.num_layers": config.num_layers,
        "generator.prior.window": config.window,
        "num_workers": 0,
        "zero_stage": config.zero_stage,
        "log_every": _LOG_EVERY,
        "corpus": corpus,
        "out": out,
    }
    return load_train_config("igpg", [f"{name}={value}" for name, value in (settings | changes).items()])


def _overhead(trainer: list[float], bare: list[float]) -> float:
    """Median over blocks of steps that hold one row of the log each."""
    starts = range(_WARM_UP, len(bare) - _LOG_EVERY + 1, _LOG_EVERY)
    blocks = [slice(start, start + _LOG_EVERY) for start in starts]
    return median(sum(trainer[block]) / sum(bare[block]) for block in blocks) - 1


def _conditions(times: Times) -> dict[str, Any]:
    return {
        "bare_step_seconds": round(median(times.bare[_WARM_UP:]), 4),
        "overhead_of_cpu_seconds": round(_overhead(times.trainer_cpu, times.bare_cpu), 4),
        "largest_loss_rel_diff": times.loss_rel_diff,
    }


def _input_wait(config: TrainOverheadConfig, folder: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """Trains on a corpus larger than the worker's limit, in a process of its own."""
    limit = int(config.limit_gib * _GIB)
    num_networks = math.ceil(config.over_limit * limit / (4 * config.large_values))
    corpus = random_corpus(folder / "large", num_networks, _shape(config.large_values))
    spec = _spec(config, corpus, folder / "run-large")
    _in_process(_train_limited, spec, limit)
    rows = [row["perf"] for row in read_metrics(spec.config.out)][2:]  # Without the first step of each stage.
    figures = {"input_wait": median(perf["input_wait"] for perf in rows)}
    return figures, {
        "corpus_gib": round(sum(shard.num_bytes for shard in corpus.shards) / _GIB, 3),
        "limit_gib": config.limit_gib,
        "limited_by": "RLIMIT_DATA, private memory; mapped shards are left to the page cache",
        "anon_gib": round(max(perf["anon_gib"] for perf in rows), 3),
        "largest_input_wait": round(max(perf["input_wait"] for perf in rows), 4),
        "step_seconds": round(median(perf["seconds_per_step"] for perf in rows), 4),
    }


def _train_limited(spec: RunSpec, limit: int) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    train_here([spec], Stop())


def _startup(config: TrainOverheadConfig, corpus: Corpus, out: Path) -> dict[str, float]:
    """Returns the seconds of each part of a start, in a process of its own."""
    shutil.rmtree(out, ignore_errors=True)
    run = _run_config(config, corpus.location, out, num_workers=2, log_every=1, **{"generator.prior.num_steps": 1})
    begin = time.time()
    _in_process(_launch_marked, run)
    imported, connected = (float(line) for line in (out / "marks").read_text().split())
    checked = (out / STAGES_FILE).stat().st_mtime
    started = (out / TENSORBOARD).stat().st_mtime
    parts = {
        "import": imported - begin,
        "ray": connected - imported,
        "checks": checked - connected,
        "workers": started - checked,
        "first_step": read_metrics(out)[0]["time"],
    }
    return {name: round(seconds, 2) for name, seconds in parts.items()}


def _launch_marked(run: TrainConfig) -> None:
    marks = [time.time()]
    with ray_session():
        marks.append(time.time())
        Path(run.out).mkdir(parents=True)
        (Path(run.out) / "marks").write_text("\n".join(map(str, marks)))
        launch([run])


def _in_process(work: Callable[..., None], *arguments: Any) -> None:
    process = multiprocessing.get_context("spawn").Process(target=work, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{work.__name__} failed with exit code {process.exitcode}; its error is above")
