"""`train_zoo` on a real Ray session."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from raywgen import actor_pool
from raywgen.corpus import Corpus, CorpusError
from raywgen.stops import Stopped, keeping, stop_signals
from raywgen.zoo import train_zoo
from raywgen.zoo.task_pool import run_over_ray
from tests.conftest import TINY_ZOO


@pytest.fixture(scope="module", autouse=True)
def ray_session() -> Iterator[None]:
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, int]]]:
    root = tmp_path_factory.mktemp("zoo") / "corpus"
    progress: list[tuple[int, int]] = []
    train_zoo(TINY_ZOO, str(root), lambda done, total: progress.append((done, total)))
    return root, progress


def weights(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.arrow")}


def test_parallel_tasks_write_what_one_process_writes(
    trained: tuple[Path, list[tuple[int, int]]], zoo_corpus: Corpus
) -> None:
    root, progress = trained
    assert weights(root) == weights(Path(zoo_corpus.location))
    num_steps = (12 + 3 + 4) * 2 * 2 * TINY_ZOO.num_steps
    assert progress[-1] == (num_steps, num_steps)
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_ray_waits_says_what_is_kept(number: signal.Signals) -> None:
    """Ray's waits end by an exit of their own, whatever a signal's handler has raised."""
    import ray

    @ray.remote(num_cpus=0)
    def rest() -> None:
        time.sleep(60)

    threading.Timer(1.0, os.kill, [os.getpid(), number]).start()
    with pytest.raises(Stopped, match="the zoo is kept") as stopped, stop_signals(), keeping("the zoo is kept"):
        ray.wait([rest.remote()])
    assert stopped.value.code == 128 + number


def test_progress_is_reported_within_a_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actor_pool, "_SECONDS_BETWEEN_SHARES", 0.0)
    config = dataclasses.replace(TINY_ZOO, networks=[[64, 6, 2]], num_steps=20, checkpoint_steps=[20])
    progress: list[tuple[int, int]] = []
    train_zoo(config, str(tmp_path / "c"), lambda done, total: progress.append((done, total)), distributed=False)
    total = (12 + 3 + 4) * 2 * 20
    done = [steps for steps, _ in progress]
    assert {steps for _, steps in progress} == {total}
    assert done == sorted(done)
    # A report a step of each stack, and more stacks than one.
    assert len(set(done)) > 20
    assert done[-1] == total


def test_a_share_reaches_the_driver_while_its_unit_is_under_way() -> None:
    def work(unit: int, on_share: Callable[[float], None]) -> int:
        for tenth in range(10):
            # Longer in all than the pause between two reports.
            time.sleep(0.25)
            on_share(tenth / 10)
        return unit

    shares: list[tuple[int, float]] = []
    assert list(run_over_ray(work, [7], str, None, lambda *share: shares.append(share))) == [(0, 7)]
    assert shares[0] == (0, 0.0)
    assert any(share > 0 for _, share in shares)


def test_the_same_recipe_again_is_reused(trained: tuple[Path, list[tuple[int, int]]]) -> None:
    root, _ = trained
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    progress: list[tuple[int, int]] = []
    config = dataclasses.replace(TINY_ZOO, stack_size=99, out="elsewhere")
    corpus = train_zoo(config, str(root), lambda done, total: progress.append((done, total)))
    assert not progress
    assert corpus.manifest["recipe"]["num_diverged"] == 0
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()} == before


def test_another_recipe_is_refused_and_nothing_is_lost(trained: tuple[Path, list[tuple[int, int]]]) -> None:
    root, _ = trained
    before = weights(root)
    with pytest.raises(CorpusError, match="another recipe"):
        train_zoo(dataclasses.replace(TINY_ZOO, num_steps=130), str(root))
    assert weights(root) == before
    Corpus.open(root)


def test_a_worker_error_reaches_the_user(tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("no folder")
    with pytest.raises(CorpusError, match="weights"):
        train_zoo(TINY_ZOO, str(tmp_path))
