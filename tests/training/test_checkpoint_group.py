"""Workers in threads of this process, which may or may not reach the same run folder."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from raywgen.config import ConfigError
from raywgen.storage import Storage
from raywgen.training.checkpoints import CheckpointManager, SaveError, TrainState, agree_on_folder


@dataclass
class Threads:
    """The group of two threads, as both of them see it."""

    num_workers: int = 2
    texts: list[str] = field(default_factory=lambda: ["", ""])
    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(2, timeout=60))


class Worker:
    def __init__(self, rank: int, threads: Threads) -> None:
        self.rank, self.num_workers, self._threads = rank, threads.num_workers, threads

    def exchange(self, text: str) -> list[str]:
        self._threads.texts[self.rank] = text
        self._threads.barrier.wait()
        found = list(self._threads.texts)
        self._threads.barrier.wait()
        return found


@pytest.fixture
def pair() -> list[Worker]:
    threads = Threads()
    return [Worker(rank, threads) for rank in range(2)]


def test_workers_agree_on_a_name_for_their_launch(pair: list[Worker], tmp_path: Path) -> None:
    with ThreadPoolExecutor() as pool:
        names = list(pool.map(lambda worker: agree_on_folder(str(tmp_path), worker), pair))
    assert names[0] == names[1]
    with ThreadPoolExecutor() as pool:
        again = list(pool.map(lambda worker: agree_on_folder(str(tmp_path), worker), pair))
    assert again[0] == again[1] != names[0]


def test_workers_whose_nodes_do_not_share_the_folder_are_told_so(pair: list[Worker], tmp_path: Path) -> None:
    def agree(worker: Worker) -> str:
        with pytest.raises(ConfigError) as failure:
            agree_on_folder(str(tmp_path / str(worker.rank)), worker, seconds=0.1)
        return str(failure.value)

    with ThreadPoolExecutor() as pool:
        one, other = pool.map(agree, pair)
    assert one == other
    assert "worker 1 on node" in one
    assert "does not see what worker 0 writes there; give an `out` on a file system that all nodes share" in one


def test_where_one_worker_cannot_write_all_are_told_and_no_index_is_written(
    pair: list[Worker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an earlier launch has left in the folder is not taken for the part of this one."""
    monkeypatch.setattr("raywgen.training.checkpoints.writer._PATIENCE_SECONDS", 1.0)
    open_output = Storage.open_output

    def full(self: Storage, relative: str) -> object:
        if failing in relative:
            raise PermissionError(13, "Permission denied")
        return open_output(self, relative)

    def save(worker: Worker, launch: str, step: int) -> str:
        checkpoints = CheckpointManager(tmp_path, worker, launch)
        checkpoints.save(TrainState(step=step), {"model.a": torch.arange(10.0)})
        try:
            checkpoints.wait()
        except SaveError as error:
            return str(error)
        return ""

    monkeypatch.setattr(Storage, "open_output", full)
    for number, (step, failing) in enumerate([(1, "none"), (2, "part-00000"), (2, "part-00001")]):
        with ThreadPoolExecutor() as pool:
            one, other = pool.map(lambda worker, n=number, s=step: save(worker, f"launch-{n}", s), pair)
        assert one == other
        assert ("the last one is 00-000000001" in one) == (failing != "none")
    assert CheckpointManager(tmp_path).position() == (0, 1)
