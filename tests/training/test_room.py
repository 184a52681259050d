"""A run whose cluster has lost the room for its workers ends, and says what is missing."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray._private.ray_constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
from ray.exceptions import ActorDiedError
from ray.experimental.internal_kv import _internal_kv_get  # pyright: ignore[reportPrivateUsage]

from raywgen.benchmarks.chaos_cluster import TrainCommand, local_cluster
from raywgen.benchmarks.chaos_runs import run_config, wait_for
from raywgen.corpus import Corpus
from raywgen.training import TrainConfig, room
from raywgen.training.room import ask_autoscaler, await_room, missing_room, remedy
from raywgen.training.session import ray_session
from raywgen.training.worker_failures import FailureLog, lost_room
from raywgen.training.workers_log import add_trouble, read_workers


def test_room_is_that_of_the_fewest_workers() -> None:
    fixed, elastic = TrainConfig(num_workers=3), TrainConfig(num_workers=[2, 8], room_timeout=30)
    assert missing_room(fixed, [{"CPU": 2.0}, {"CPU": 1.0}]) is None
    assert missing_room(elastic, [{"CPU": 2.0}]) is None
    assert missing_room(fixed, [{"CPU": 2.0}]) == (
        "the cluster has had no room for 3 workers with 1 CPU each for 600 s: it has 2 CPU on 1 node"
    )
    assert (
        missing_room(elastic, [])
        == "the cluster has had no room for 2 workers with 1 CPU each for 30 s: it has no node"
    )
    gpus = TrainConfig(num_workers=2, device="cuda")
    assert "2 workers with 1 GPU each for 600 s: it has 8 CPU and 1 GPU" in (
        missing_room(gpus, [{"CPU": 8.0, "GPU": 1.0}]) or ""
    )
    assert remedy(fixed).endswith("when there is room, or num_workers=[1,3] goes on with fewer workers")
    assert remedy(TrainConfig(num_workers=[1, 3])).endswith("from the last checkpoint when there is room")


def test_only_a_time_without_room_that_nothing_interrupts_ends_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of its own, which is asked four times in `room_timeout`."""
    now, ended, over = [0.0], [], threading.Event()

    def sleep(seconds: float) -> None:
        now[0] += seconds

    def end(reason: str) -> None:
        ended.append(now[0])
        over.set()

    monkeypatch.setattr(room, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    # Room comes back at 0.75, before the first second is over, and is gone again at 1.0.
    room.watch_room(TrainConfig(num_workers=1, room_timeout=1), lambda: [{"CPU": 1.0}] if now[0] == 0.75 else [], end)
    assert over.wait(60)
    assert ended == [2.0]


@pytest.mark.parametrize(("comes_at", "reason"), [(0.0, None), (0.5, None), (9.0, "2 workers with 1 CPU each for 1 s")])
def test_a_run_that_begins_asks_for_its_nodes_and_waits_for_them(
    comes_at: float, reason: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now, asked = [0.0], list[list[Any]]()

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(room, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    run = TrainConfig(out="run", num_workers=2, room_timeout=1)
    found = await_room(run, lambda: [{"CPU": 4.0}] if now[0] >= comes_at else [{"CPU": 1.0}], asked.append)
    assert (found is None) if reason is None else (found is not None and reason in found)
    assert asked == ([] if comes_at == 0 else [[{"CPU": 1.0}] * 2, []])
    assert ("run waits up to 1 s for nodes for its workers" in capsys.readouterr().err) == bool(asked)
    assert now[0] == min(comes_at, 1.0)


def test_the_cluster_keeps_what_its_autoscaler_is_asked_for() -> None:
    def asked_for() -> list[dict[str, float]]:
        found = _internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL)
        return json.loads(found) if found else []

    with ray_session():
        ask_autoscaler([{"CPU": 1.0}, {"CPU": 1.0}])
        assert asked_for() == [{"CPU": 1.0}, {"CPU": 1.0}]
        ask_autoscaler([])
        assert not asked_for()


class Controller:
    """Calls the log of failures in an actor, as Ray Train's controller does."""

    def __init__(self, out: str, config: TrainConfig) -> None:
        self._log = FailureLog([out], config)

    def lose_a_worker(self) -> None:
        self._log.after_exception(None, {0: ValueError("gone")})

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)


def test_the_controller_of_a_run_without_room_is_ended_and_says_why(tmp_path: Path) -> None:
    lost, kept = str(tmp_path / "lost"), str(tmp_path / "kept")
    with ray_session():
        actor: Any = ray.remote(num_cpus=0)(Controller)
        too_many, fitting = (TrainConfig(num_workers=number, room_timeout=0.5) for number in (500, 1))
        controllers = [actor.remote(lost, too_many), actor.remote(kept, fitting)]
        ray.get([controller.lose_a_worker.remote() for controller in controllers])
        with pytest.raises(ActorDiedError):
            ray.get(controllers[0].wait.remote(60))
        ray.get(controllers[1].wait.remote(1))
    assert (lost_room([lost]) or "").startswith(
        "the cluster has had no room for 500 workers with 1 CPU each for 0.5 s: it has "
    )
    assert lost_room([kept]) is None
    assert len(read_workers(kept)) == 1
    add_trouble(lost, "another")
    assert lost_room([lost]) is None


@pytest.mark.slow
def test_a_run_of_a_fixed_size_ends_where_nodes_do_not_come_back(
    zoo_corpus: Corpus, tmp_path: Path, one_thread: None
) -> None:
    run = run_config("igpg", zoo_corpus.location, tmp_path / "run", 100_000, num_workers=2, room_timeout=5.0)
    with local_cluster(3) as cluster:
        command = TrainCommand([run], cluster.address)
        command.start()
        try:
            wait_for(lambda: command.view.taken() >= 3 or command.is_over(), 300, "three steps")
            for pid in command.pids():
                cluster.remove_node_of(pid)
            wait_for(command.is_over, 300, "the end of the run")
        finally:
            command.kill()
    assert (
        "training stopped: the cluster has had no room for 2 workers with 1 CPU each for 5 s: it has 1 CPU (at most 1 "
        "on one) on 2 nodes; the same command goes on from the last checkpoint when there is room, or "
        "num_workers=[1,2] goes on with fewer workers"
    ) in command.output()
