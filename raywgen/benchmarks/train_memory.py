"""Measures how the memory of training grows with the number of checkpoints N and the size D of a network.

Every measurement runs in a process of its own, whose anonymous memory is sampled while it works: pages of mapped shards
do not count, as the system may drop them. A driver's process does what launching a run does before workers start; a
worker's process trains each stage for some steps, validates, and writes a checkpoint and a bundle. At last both sources
of batches are compared.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isqrt
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch

from raywgen.benchmarks.memory_peak import memory_peak
from raywgen.benchmarks.random_corpus import random_facts
from raywgen.benchmarks.sources_equal import sources_equal
from raywgen.corpus import Corpus, NetworkFacts, TaskFacts, commit_corpus, write_shard
from raywgen.corpus.shards import Shard
from raywgen.generators.bundle import build_generator
from raywgen.tasks import build_network, build_task
from raywgen.training import TrainConfig, launch
from raywgen.training.batch_plan import STAGE_STREAM, BatchPlan, StageView
from raywgen.training.config import load_train_config
from raywgen.training.data import data_spec, measure_normalizers
from raywgen.training.engine import LocalEngine
from raywgen.training.rows import data_digest
from raywgen.training.run_moments import rows_with_moments
from raywgen.weights import Layout

_SMALL = 100_000
_GIB = 2**30
_SETTINGS = {
    "tokenizer": [
        "method=igpg",
        "generator.tokenizer.num_steps=3",
        "generator.tokenizer.batch_size=8",
        "generator.prior.num_steps=0",
        "generator.task_loss.num_steps=0",
    ],
    "prior": [
        "method=igpg",
        "generator.tokenizer.num_steps=1",
        "generator.tokenizer.batch_size=8",
        "generator.prior.num_steps=3",
        "generator.prior.batch_size=8",
        "generator.prior.window=256",
        "generator.task_loss.num_steps=0",
    ],
    "scales": [
        "method=igpg",
        "generator.tokenizer.num_steps=3",
        "generator.tokenizer.batch_size=8",
        "generator.tokenizer.scales=filter",
        "generator.prior.num_steps=3",
        "generator.prior.batch_size=8",
        "generator.prior.window=256",
        "generator.task_loss.num_steps=0",
    ],
    "mcdi": [
        "method=mcdi",
        "generator.diffusion.num_targets=2",
        "generator.denoiser.num_steps=3",
        "generator.denoiser.batch_size=4",
        "generator.denoiser.meta=joint",
        "generator.network.kind=chunks",
    ],
    "lohp": [
        "method=lohp",
        "generator.path={num_steps: 4, length: 2}",
        "generator.sampling.num_steps=2",
        "generator.policy.num_steps=3",
        "generator.policy.batch_size=4",
        "generator.network.kind=chunks",
    ],
}


@dataclass(kw_only=True)
class TrainMemoryConfig:
    """The corpora, and what is trained on them.

    Attributes:
        methods: The stages that are trained: `tokenizer`, `prior`, `scales` (both of these, with scales as tokens),
            `mcdi`, `lohp`.
        num_networks: N of the corpora that differ in it.
        network_values: D of these.
        sizes: D of the corpora that differ in it.
        networks_of_a_size: N of these.
        repeats: Processes for each measurement, of which the median counts. They give freed memory back at once, so
            that a peak is of memory in use, and not of how an allocator places blocks.
        rounds: Steps of which the median CPU time counts.
        folder: Folder of corpora and runs; a temporary one by default.
    """

    methods: list[str] = field(default_factory=lambda: list(_SETTINGS))
    num_networks: list[int] = field(default_factory=lambda: [2, 8, 32])
    network_values: int = 10_000_000
    sizes: list[int] = field(default_factory=lambda: [10_000_000, 40_000_000, 160_000_000])
    networks_of_a_size: int = 2
    repeats: int = 3
    rounds: int = 15
    folder: str = ""


def measure(config: TrainMemoryConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Makes the corpora, and measures every method on each of them."""
    folder = Path(config.folder or tempfile.mkdtemp(prefix="raywgen-memory-"))
    by_number = {count: task_corpus(folder, count, config.network_values) for count in config.num_networks}
    by_size = {size: task_corpus(folder, config.networks_of_a_size, size) for size in config.sizes}
    peaks: dict[str, dict[str, list[float]]] = {}
    figures: dict[str, float] = {}
    for method in config.methods:
        found = {
            f"{part}_{name}": [_peak(work, method, path, folder, config.repeats) for path in corpora.values()]
            for part, work in (("worker", _train), ("driver", _prepare))
            for name, corpora in (("n", by_number), ("d", by_size))
        }
        peaks[method] = {name: [round(value / _GIB, 3) for value in values] for name, values in found.items()}
        bytes_n = [4 * count * config.network_values for count in by_number]
        bytes_d = [4 * size for size in by_size]
        for part in ("worker", "driver"):
            for name, sizes in (("n", bytes_n), ("d", bytes_d)):
                values = found[f"{part}_{name}"]
                slope = (values[-1] - values[0]) / (sizes[-1] - sizes[0])
                key = f"{part}_slope_{name}"
                figures[key] = max(figures.get(key, 0.0), slope)
        figures["peak_anon_gib"] = max(figures.get("peak_anon_gib", 0.0), found["worker_d"][-1] / _GIB)
    small, large = task_corpus(folder, config.networks_of_a_size, _SMALL), by_size[config.sizes[-1]]
    ratios = {method: _step_ratio(method, small, large, config.rounds, folder) for method in config.methods}
    figures["step_over_small"] = max(ratios.values())
    figures["sources_equal"] = min(
        sources_equal(_run_config(method, next(iter(by_number.values())), folder / "sources" / method))
        for method in config.methods
    )
    figures["bundle_bytes_per_value"] = max(
        (_bundle_bytes(method, large, folder) - _bundle_bytes(method, small, folder)) / config.sizes[-1]
        for method in config.methods
    )
    if not config.folder:
        shutil.rmtree(folder)
    conditions = {
        "peak_gib": peaks,
        "num_networks": config.num_networks,
        "network_values": config.network_values,
        "sizes": config.sizes,
        "repeats": config.repeats,
        "step_ratios": {name: round(ratio, 3) for name, ratio in ratios.items()},
        "cores": os.cpu_count(),
    }
    return {name: round(value, 5) for name, value in figures.items()}, conditions


def task_corpus(folder: Path, num: int, num_values: int) -> str:
    """Writes random networks of one layout and one task, each in a shard of its own; kept if they are there."""
    path = folder / f"corpus-{num}-{num_values}"
    if (path / "manifest.json").is_file():
        return str(path)
    width = isqrt(num_values)
    recipe = {"name": "mlp", "widths": [64, width, width, 2]}
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in build_network(recipe).state_dict().items()}
    layout = Layout.from_state_dict({name: torch.empty(shape) for name, shape in shapes.items()})
    labels = [0, 2, 4, 6, 8]
    task = build_task({"name": "digits-subset", "labels": labels})
    facts_of_task = TaskFacts(
        task_id="even",
        instruction=task.instruction,
        split="seen",
        recipe={"name": "digits-subset", "labels": labels},
        samples_SF=task.train_x_SF[:64],
        labels_S=task.train_y_S[:64],
    )
    shards: list[Shard] = []
    for index in range(num):
        generator = torch.Generator().manual_seed(index)
        state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        # Two states of each run, which Mc-Di and Lo-Hp learn from.
        run = {"trajectory_id": f"run-{index // 2}", "start_seed": index // 2, "step": 1 + index % 2, "task_id": "even"}
        facts = random_facts(f"network-{index}", layout, **run)
        packed_1P = layout.pack(state).unsqueeze(0)
        shards.append(write_shard(str(path), f"network-{index}", layout, [facts], packed_1P, is_finite=True))
    network = NetworkFacts(name="mlp", layout=layout, recipe=recipe)
    commit_corpus(str(path), shards=shards, tasks=[facts_of_task], networks=[network], recipe={"benchmark": "memory"})
    return str(path)


def _run_config(method: str, corpus: str, out: Path) -> TrainConfig:
    settings = [*_SETTINGS[method], f"corpus={corpus}", f"out={out}", "num_workers=0", "log_every=1"]
    return load_train_config(None, settings)


def _peak(work: Callable[[TrainConfig], None], method: str, corpus: str, folder: Path, repeats: int) -> float:
    """Returns the median over some processes of what `_in_process` measures: allocators do not place all runs alike."""
    return median(_in_process(work, method, corpus, folder) for _ in range(repeats))


def _in_process(work: Callable[[TrainConfig], None], method: str, corpus: str, folder: Path) -> float:
    """Returns by how many bytes the anonymous memory of a fresh process grows at most while it does some work."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    out = folder / "runs" / f"{work.__name__}-{method}-{Path(corpus).name}"
    shutil.rmtree(out, ignore_errors=True)
    process = multiprocessing.get_context("spawn").Process(target=_child, args=(sender, work, method, corpus, out))
    with _exact_allocator():
        process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


@contextmanager
def _exact_allocator() -> Iterator[None]:
    """Processes that start within give large blocks back to the system as soon as they are freed (glibc's allocator).

    Otherwise their peaks differ by some percent from run to run, by the places that blocks happen to get.
    """
    before = dict(os.environ)
    os.environ |= {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before


def _child(sender: Connection, work: Callable[[TrainConfig], None], method: str, corpus: str, out: Path) -> None:
    config = _run_config(method, corpus, out)
    with memory_peak() as peak:
        before = peak()
        work(config)
        sender.send(float(peak() - before))


def _train(config: TrainConfig) -> None:
    launch([config])


def _prepare(config: TrainConfig) -> None:
    """Does what the launching process does before any worker starts."""
    corpus = Corpus.open(config.corpus)
    data_digest(corpus)
    build_generator(config.method, config.generator, measure_normalizers(corpus), data_spec(corpus), config.seed)


def _step_ratio(method: str, small: str, large: str, rounds: int, folder: Path) -> float:
    """The CPU time of a step on large networks over that on small ones, which alternate."""
    steps = [_stepper(method, corpus, folder / "steps" / method) for corpus in (small, large)]
    times: tuple[list[float], list[float]] = ([], [])
    for index in range(rounds + 2):
        for step, seconds in zip(steps, times, strict=True):
            begin = time.process_time()
            step(index)
            seconds.append(time.process_time() - begin)
    return median(times[1][2:]) / median(times[0][2:])


def _stepper(method: str, location: str, out: Path) -> Callable[[int], None]:
    config, corpus = _run_config(method, location, out), Corpus.open(location)
    generator = build_generator(
        config.method, config.generator, measure_normalizers(corpus), data_spec(corpus), config.seed
    )
    plan = BatchPlan(
        rows_with_moments(corpus, generator, generator.stages(), out).train,
        seed=0,
        num_condition_samples=4,
        num_query_samples=4,
        num_targets=generator.needs.num_targets,
    )
    first, stage = generator.stages()[0], generator.stages()[-1]
    view = StageView(first, 0, 0)
    first.setup((plan.for_stage(step, first.config.batch_size, view, whole=True)[0] for step in range(2)), 0)
    engine = LocalEngine(stage)
    size = stage.config.batch_size

    def step(index: int) -> None:
        batch, noise = plan.for_stage(index, size, StageView(stage, 0, STAGE_STREAM))
        engine.train_step(batch, noise, 1e-3, size)

    return step


def _bundle_bytes(method: str, corpus: str, folder: Path) -> int:
    out = folder / "runs" / f"_train-{method}-{Path(corpus).name}"
    if not out.is_dir():
        launch([_run_config(method, corpus, out)])
    return sum(file.stat().st_size for file in (out / "generator").rglob("*") if file.is_file())
