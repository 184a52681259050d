"""Items over a real Ray session: if workers die, all that can be done is done, and the error says so."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch import Tensor, nn

from raywgen import actor_pool
from raywgen.actor_pool import ActorsLostError, OnShare
from raywgen.corpus import Corpus
from raywgen.zoo import train_zoo
from raywgen.zoo.task_pool import run_over_ray
from tests.conftest import TINY_ZOO, make_zoo

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


class Mortal(nn.Sequential):
    """Kills every process but the driver while a file is there."""

    def __init__(self, mark: str, driver: int) -> None:
        super().__init__(nn.Linear(64, 3), nn.ReLU(), nn.Linear(3, 2))
        self.mark, self.driver = Path(mark), driver

    def forward(self, input: Tensor) -> Tensor:
        if self.mark.exists() and os.getpid() != self.driver:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(input)


@pytest.fixture(scope="module", autouse=True)
def ray_session() -> Iterator[None]:
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def dying(folder: Path, deaths: dict[int, int]) -> Callable[[int, OnShare], int]:
    """Squares a number; the worker of some dies so many times before: of even ones it exits, of odd ones it is killed.

    Nested, so that it is pickled by value.
    """

    def square(number: int, on_share: OnShare) -> int:
        mark = folder / f"{number}-{time.monotonic_ns()}"
        if len(list(folder.glob(f"{number}-*"))) < deaths.get(number, 0):
            mark.touch()
            if number % 2 == 0:
                os._exit(1)
            os.kill(os.getpid(), signal.SIGKILL)
        return number**2

    return square


def number(text: str, on_share: OnShare) -> float:
    return float(text)


def test_units_whose_workers_died_are_done_by_others(tmp_path: Path) -> None:
    news: list[str] = []
    done = dict(run_over_ray(dying(tmp_path, {1: 3, 4: 1}), range(6), str, news.append))
    assert done == {place: place**2 for place in range(6)}
    assert [line.split(" was ")[0] for line in news].count("the worker of 1") == 3
    assert sum("the worker of" in line for line in news) == 4


def test_a_unit_that_kills_every_worker_is_given_up_and_the_others_are_done(tmp_path: Path) -> None:
    done = []
    with pytest.raises(ActorsLostError, match=r"^2 was given up: each of its 4 workers was lost.*memory.*same command"):
        done.extend(run_over_ray(dying(tmp_path, {2: 99}), range(6), str))
    assert sorted(done) == [(place, place**2) for place in range(6) if place != 2]
    assert len(list(tmp_path.iterdir())) == 4


def test_a_zoo_whose_workers_die_keeps_what_is_done_and_goes_on(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    mortal = {"name": "tests.zoo.test_task_pool:Mortal", "mark": str(mark), "driver": os.getpid()}
    # One stack of each architecture.
    config = dataclasses.replace(
        TINY_ZOO,
        networks=[[64, 6, 2], mortal],
        num_seen_tasks=3,
        num_validation_tasks=0,
        num_unseen_tasks=0,
        seeds_per_task=1,
        num_steps=20,
        checkpoint_steps=[20],
    )
    mark.touch()
    progress: list[tuple[int, int]] = []
    with pytest.raises(ActorsLostError, match="smaller stack_size"):
        train_zoo(config, str(tmp_path / "c"), lambda done, total: progress.append((done, total)))
    # Three of six networks, in steps; what the others' workers had begun counts for nothing once they are dead.
    assert progress[-1] == (3 * 20, 6 * 20)
    mark.unlink()
    again: list[tuple[int, int]] = []
    corpus = train_zoo(config, str(tmp_path / "c"), lambda done, total: again.append((done, total)))
    assert again[-1] == (6 * 20, 6 * 20)
    whole: Corpus = make_zoo(config, tmp_path / "here")
    assert sorted(corpus.facts.column("checkpoint_id").to_pylist()) == sorted(
        whole.facts.column("checkpoint_id").to_pylist()
    )


def test_long_work_and_cpus_that_others_hold_are_no_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(actor_pool, "_LOOK_SECONDS", 0.2)
    monkeypatch.setattr(actor_pool, "_PATIENCE_SECONDS", 3.0)

    def rest(seconds: float, on_share: OnShare | None = None) -> float:
        time.sleep(seconds)
        return seconds

    held = [ray.remote(num_cpus=1)(rest).remote(6.0) for _ in range(2)]
    # Both must be there before, or a unit would be first.
    while ray.available_resources().get("CPU", 0.0) > 0:
        time.sleep(0.05)
    news: list[str] = []
    assert list(run_over_ray(rest, [6.0], str, news.append)) == [(0, 6.0)]
    assert news == ["waiting for a worker: the cluster has 2 CPUs, 0 of them free"]
    ray.get(held)


def test_workers_that_never_begin_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """No patience at all: even a worker that begins after a while comes too late."""
    monkeypatch.setattr(actor_pool, "_LOOK_SECONDS", 0.001)
    monkeypatch.setattr(actor_pool, "_PATIENCE_SECONDS", 0.0)
    with pytest.raises(ActorsLostError, match=r"no worker has begun.*of 2 CPUs are free.*memory"):
        list(run_over_ray(number, ["1"], str))


def test_errors_of_the_work_itself_are_raised_as_they_are() -> None:
    with pytest.raises(ValueError, match="could not convert"):
        list(run_over_ray(number, ["1", "x"], str))
