"""The history of a run's workers, and what it and the messages say of failures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError

from raywgen.config import load_config
from raywgen.corpus import Corpus
from raywgen.training import TrainConfig, launch
from raywgen.training.worker_failures import FailureLog, failure_text, places_of, worker_timeouts
from raywgen.training.workers_log import WORKERS, Start, add_start, add_trouble, read_workers

PLACES = ["node a, process 1, log /logs/a", "node b, process 2, log /logs/b"]
DIED = WorkerHealthCheckFailedError("A worker health check failed.", ActorDiedError())
HUNG = WorkerHealthCheckTimeoutError("A worker health check has been hanging for 9 seconds.")
CUT_OFF = RuntimeError("[gloo/pair.cc:534] Connection closed by peer [127.0.0.1]:3")


def starts(out: Path) -> list[Start]:
    return [event for event in read_workers(out) if isinstance(event, Start)]


def test_each_start_has_its_reason(tmp_path: Path) -> None:
    assert read_workers(tmp_path) == []
    add_start(tmp_path, "one", 2, "tokenizer", 0, PLACES)
    add_trouble(tmp_path, "rank 1 died")
    add_trouble(tmp_path, "rank 0 failed, as rank 1 was gone")
    add_start(tmp_path, "one", 1, "tokenizer", 20, PLACES[:1])
    add_start(tmp_path, "one", 2, "tokenizer", 40, PLACES)
    add_start(tmp_path, "two", 2, "prior", 0, PLACES)
    assert [start.reason for start in starts(tmp_path)] == [
        "the run began",
        "rank 1 died",
        "there was room for 2 workers instead of 1",
        "the command was given again",
    ]
    assert places_of(str(tmp_path)) == PLACES


def test_damaged_rows_are_skipped(tmp_path: Path) -> None:
    add_start(tmp_path, "one", 2, "tokenizer", 0, PLACES)
    good = (tmp_path / WORKERS).read_text()
    broken = [good[:40], "[]", good.replace('"workers": 2', '"workers": "2"'), good.replace(WORKERS, ""), ""]
    (tmp_path / WORKERS).write_text("\n".join([*broken, '{"time": 3.0, "reason": "rank 1 died"}']))
    assert len(starts(tmp_path)) == 1
    assert [event.reason for event in read_workers(tmp_path)] == ["the run began", "rank 1 died"]


@pytest.mark.parametrize(
    ("failures", "text"),
    [
        ({0: CUT_OFF, 1: DIED}, "rank 1 (node b, process 2, log /logs/b) died"),
        ({0: CUT_OFF, 1: HUNG}, "rank 1 (node b, process 2, log /logs/b) did not answer for 9 s"),
        ({0: CUT_OFF, 1: KeyError("x")}, "rank 1 (node b, process 2, log /logs/b) failed: KeyError: 'x'"),
        ({0: CUT_OFF}, f"rank 0 (node a, process 1, log /logs/a) lost another worker: RuntimeError: {CUT_OFF}"),
        ({2: ValueError()}, "rank 2 failed: ValueError: it gives no reason"),
    ],
)
def test_a_failure_is_told_by_the_rank_that_explains_it(failures: dict[int, Exception], text: str) -> None:
    assert failure_text(failures, PLACES, 9.0) == text


def test_a_failure_belongs_to_the_first_run_that_is_not_done(tmp_path: Path) -> None:
    add_start(tmp_path, "one", 2, "tokenizer", 0, PLACES)
    FailureLog([str(tmp_path), str(tmp_path / "other")], TrainConfig(worker_timeout=9.0)).after_exception(
        None, {1: HUNG}
    )
    assert read_workers(tmp_path)[-1].reason == "rank 1 (node b, process 2, log /logs/b) did not answer for 9 s"
    assert not (tmp_path / "other").exists()


def test_timeouts_of_the_users_environment_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    health, collective = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", "RAY_TRAIN_COLLECTIVE_TIMEOUT_S"
    monkeypatch.delenv(health, raising=False)
    monkeypatch.setenv(collective, "7")
    with worker_timeouts(30.0):
        assert (os.environ[health], os.environ[collective]) == ("30", "7")
    assert health not in os.environ
    assert os.environ[collective] == "7"


def test_a_run_in_one_process_keeps_its_history(zoo_corpus: Corpus, tmp_path: Path) -> None:
    sizes = ["generator.task_loss.num_steps=2", "generator.task_loss.batch_size=4", "num_workers=0"]
    where = ["method=hypernetwork", f"corpus={zoo_corpus.location}", f"out={tmp_path}"]
    config = load_config(TrainConfig, None, [*where, *sizes])
    launch([config], stop_at=0.5)
    launch([config])
    launch([config])  # It is done, and nothing is started.
    found = [(start.workers, start.step, start.reason) for start in starts(tmp_path)]
    assert found == [(0, 0, "the run began"), (0, 1, "the command was given again")]
