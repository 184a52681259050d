"""Checkpoints of real groups of processes (gloo), each of which writes and reads its own slices."""

from __future__ import annotations

import logging
import os
import shutil
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.multiprocessing.spawn import spawn

from raywgen.benchmarks.strategy_cases import CASES, batch_of, build_stage, noise_of
from raywgen.storage import Storage
from raywgen.training.agreement import exchange
from raywgen.training.checkpoints import (
    Alone,
    Checkpoint,
    CheckpointError,
    CheckpointManager,
    Group,
    TrainState,
    agree_on_folder,
)
from raywgen.training.engine import Engine, EngineSettings, LocalEngine, distributed_engine, load_parameters

CASE, BATCH, MIDDLE, END, RATE = CASES["igpg-prior"], 7, 3, 6, 1e-2
OPTIMIZER = {"ema_decay": 0.5, "epsilon": 1e-6}


class Process:
    """One process of a group."""

    def __init__(self, rank: int, num_workers: int) -> None:
        self.rank, self.num_workers = rank, num_workers

    def exchange(self, text: str) -> list[str]:
        return exchange(text, torch.device("cpu"))


def work(rank: int, num_workers: int, folder: str, jobs: list[tuple[int, str, str]]) -> None:
    """Trains under each ZeRO stage, from a checkpoint or the beginning, and notes losses in a file."""
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(num_workers), "DS_ACCELERATOR": "cpu"}
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    store = f"file://{folder}/store-{num_workers}"
    torch.distributed.init_process_group("gloo", store, timedelta(minutes=5), num_workers, rank)
    for zero_stage, start, out in jobs:
        losses = train(Process(rank, num_workers), zero_stage, start, out)
        if rank == 0:
            torch.save(losses, f"{out}/losses")
    torch.distributed.destroy_process_group()


def train(group: Group, zero_stage: int | None, start: str, out: str) -> list[float]:
    stage = build_stage(CASE, BATCH, OPTIMIZER)
    first, checkpoints = 0, CheckpointManager(out, group, agree_on_folder(out, group))
    stored = None
    if start:
        stored, passed_over = CheckpointManager(start, group).newest(lambda found: None)
        assert stored is not None, passed_over
        load_parameters(stage, stored, "model.")
        first = stored.state.step
    engine: Engine = LocalEngine(stage)
    if zero_stage is not None:
        engine = distributed_engine(stage, group.num_workers, EngineSettings(zero_stage=zero_stage, min_sharded=0))
    if stored is not None:
        engine.load(stored)
    losses = []
    for step in range(first, END):
        batch = batch_of(CASE, step, BATCH, group.rank, group.num_workers)
        losses.append(float(engine.train_step(batch, noise_of(batch), RATE, BATCH)["loss"]))
        if step + 1 == MIDDLE:
            checkpoints.save(TrainState(step=MIDDLE), engine.state(stage))
    checkpoints.save(TrainState(step=END), engine.state(stage))
    checkpoints.wait()
    return losses


def run(num_workers: int, folder: Path, jobs: list[tuple[int, str, str]]) -> None:
    spawn(work, (num_workers, str(folder), jobs), nprocs=num_workers)


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two workers under ZeRO-0, 1 and 3, in folders of these names."""
    folder = tmp_path_factory.mktemp("halves")
    run(2, folder, [(stage, "", str(folder / str(stage))) for stage in (0, 1, 3)])
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], Checkpoint]:
    """The losses of one process, and its last checkpoint."""
    folder = str(tmp_path_factory.mktemp("alone"))
    losses = train(Alone(), None, "", folder)
    return losses, CheckpointManager(folder).open(TrainState(step=END).folder)


def middle(run: Path, folder: Path) -> str:
    """A copy of a run without its last checkpoint."""
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "checkpoints" / TrainState(step=END).folder)
    return str(folder)


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_every_worker_writes_its_own_half_and_together_they_are_the_whole(
    zero_stage: int, halves: Path, alone: tuple[list[float], Checkpoint]
) -> None:
    losses, whole = alone
    run = halves / str(zero_stage)
    assert torch.load(run / "losses") == pytest.approx(losses, rel=1e-6)
    found = CheckpointManager(str(run)).open(TrainState(step=END).folder)
    found.verify(range(2))
    assert found.index.tensors.keys() == whole.index.tensors.keys()
    for name in whole.index.tensors:
        torch.testing.assert_close(found.whole(name), whole.whole(name), rtol=1e-3, atol=1e-5)
    names = sorted(path.name for path in (run / "checkpoints" / TrainState(step=END).folder).iterdir())
    assert names == ["index.json", "part-00000-of-00002.safetensors", "part-00001-of-00002.safetensors"]
    sizes = [part.num_bytes for part in found.index.parts]
    assert max(sizes) < 1.1 * min(sizes)


def test_a_worker_under_zero_3_writes_no_value_of_another(halves: Path) -> None:
    folder = halves / "3" / "checkpoints" / TrainState(step=END).folder
    index = Checkpoint.open(Storage.at(folder)).index
    for number, part in enumerate(index.parts):
        with safe_open(str(folder / part.file), "pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                (span,) = (span for span in index.tensors[name].spans if span.part == number)
                assert file.get_slice(name).get_shape() == [span.stop - span.start]
    sharded = [entry for name, entry in index.tensors.items() if name.startswith("optimizer.") and entry.shape]
    assert all(len(entry.spans) == 2 or entry.shape[0] == 1 for entry in sharded)


def test_what_two_workers_saved_goes_on_in_one_process(
    halves: Path, alone: tuple[list[float], Checkpoint], tmp_path: Path
) -> None:
    for zero_stage in (0, 1, 3):
        start = middle(halves / str(zero_stage), tmp_path / f"start-{zero_stage}")
        found = train(Alone(), None, start, str(tmp_path / str(zero_stage)))
        assert found == pytest.approx(alone[0][MIDDLE:], rel=1e-6)


@pytest.mark.slow
def test_what_two_workers_or_one_process_saved_goes_on_with_three(
    halves: Path, alone: tuple[list[float], Checkpoint], tmp_path: Path
) -> None:
    """Three workers do not divide the sizes of all tensors."""
    one = tmp_path / "one"
    train(Alone(), None, "", str(one))
    starts = {"3": (halves / "3", 3), "3-1": (halves / "3", 1), "1-3": (halves / "1", 3), "one-3": (one, 3)}
    starts |= {"one-2": (one, 2), "0-0": (halves / "0", 0)}
    jobs = [
        (stage, middle(run, tmp_path / f"start-{name}"), str(tmp_path / name)) for name, (run, stage) in starts.items()
    ]
    run(3, tmp_path, jobs)
    for name in starts:
        assert torch.load(tmp_path / name / "losses") == pytest.approx(alone[0][MIDDLE:], rel=1e-6), name


def test_each_part_is_missed_and_each_damaged_byte_noticed(halves: Path, tmp_path: Path) -> None:
    for number in range(2):
        for name, hurt in (("missing", Path.unlink), ("changed", _flip), ("cut off", _cut)):
            run = tmp_path / f"{number}-{name}"
            shutil.copytree(halves / "3", run)
            part = f"part-{number:05d}-of-00002.safetensors"
            hurt(run / "checkpoints" / TrainState(step=END).folder / part)
            found, (sentence,) = CheckpointManager(str(run)).newest(lambda found: None)
            assert found is not None
            assert found.state.step == MIDDLE
            assert part in sentence
            assert ("missing" if name == "missing" else "damaged") in sentence


def test_a_part_of_another_run_is_refused(halves: Path, tmp_path: Path) -> None:
    run, folder = tmp_path / "run", f"checkpoints/{TrainState(step=END).folder}"
    shutil.copytree(halves / "3", run)
    for other in ("3", "0"):
        earlier = folder if other == "0" else f"checkpoints/{TrainState(step=MIDDLE).folder}"
        part = "part-00001-of-00002.safetensors"
        shutil.copy(halves / other / earlier / part, run / folder / part)
        with pytest.raises(CheckpointError, match=f"{part} (is damaged|belongs to another checkpoint)"):
            Checkpoint.open(Storage.at(run / folder)).verify(range(2))


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])
