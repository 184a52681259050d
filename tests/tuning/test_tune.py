"""Real searches by Ray Tune: begun, killed, begun again; with workers on the fewest CPUs; with a population."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raywgen.config import ConfigError, load_config, save_config
from raywgen.corpus import Corpus
from raywgen.generators.hypernetwork import HypernetworkConfig
from raywgen.storage import Storage
from raywgen.training import TrainConfig, launch, read_metrics
from raywgen.training.checkpoints import CheckpointManager
from raywgen.tuning import TuneConfig, TuneResult, tune
from raywgen.tuning.results import TrialState
from tests.builders import settings_of
from tests.conftest import TINY_ZOO
from tests.tuning.builders import RATE, SPACE, WIDTH, tune_config

pytestmark = pytest.mark.slow
STEPS = "train.generator.task_loss.num_steps"


@contextmanager
def ray_of(num_cpus: int) -> Iterator[None]:
    import ray

    ray.init(address="local", num_cpus=num_cpus, include_dashboard=True, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


def facts(result: TuneResult) -> list[tuple[Any, ...]]:
    return [
        (row.trial, row.status, row.knobs, [(one.rung, one.score, one.steps) for one in row.scores])
        for row in result.rows
    ]


def command(config: TuneConfig, path: Path) -> list[str]:
    save_config(config, path)
    return [sys.executable, "-m", "raywgen.cli", "tune", str(path)]


def test_a_search_killed_in_a_trial_ends_as_an_undisturbed_one(zoo_corpus: Corpus, tmp_path: Path) -> None:
    fixed = {STEPS: 300}
    config = tune_config(zoo_corpus, tmp_path / "whole", fixed=fixed, num_trials=3)
    with ray_of(1):
        whole = tune(config)
    broken = replace(config, out=str(tmp_path / "broken"))
    process = subprocess.Popen(command(broken, tmp_path / "broken.yaml"), stdout=subprocess.DEVNULL)
    run = tmp_path / "broken" / "trials" / "001" / "run-0"
    while len(read_metrics(run)) < 20 and process.poll() is None:
        time.sleep(0.05)
    assert process.poll() is None, "over before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    position = CheckpointManager(str(run)).position()
    assert position is not None
    kept = position[1]
    before = [row for row in read_metrics(run) if row["step"] < kept]
    assert len(before) >= 10
    done = subprocess.run(command(broken, tmp_path / "broken.yaml"), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert f"train it:    raywgen train {broken.out}/best.yaml" in done.stdout
    with ray_of(1):
        again = tune(broken)
    assert facts(again) == facts(whole)
    # What was trained before the kill was not trained again: its rows are the same, down to their times.
    assert read_metrics(run)[: len(before)] == before
    assert [row["step"] for row in read_metrics(run)] == list(range(whole.rows[1].steps))

    best = load_config(TrainConfig, tmp_path / "whole" / "best.yaml")
    settings = settings_of(best, HypernetworkConfig)
    assert settings.task_loss.optimizer.learning_rate == whole.best.knobs[RATE]
    assert settings.width == whole.best.knobs[WIDTH]
    assert best.corpus == zoo_corpus.location
    launch([best])
    assert (tmp_path / "whole" / "best" / "generator" / "generator.json").is_file()
    with pytest.raises(ConfigError, match="holds another search"):
        tune(replace(config, seed=1))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_trials_of_workers_that_make_corpora_end_on_the_fewest_cpus(num_workers: int, tmp_path: Path) -> None:
    fixed = {
        "zoo.num_seen_tasks": 6,
        "zoo.num_steps": 20,
        "zoo.checkpoint_steps": [10, 20],
        "zoo.stack_size": 4,
        "train.num_workers": num_workers,
        "train.num_query_samples": 16,
        STEPS: 4,
        "train.generator.task_loss.batch_size": 4,
    }
    save_config(TINY_ZOO, tmp_path / "zoo.yaml")
    config = TuneConfig(
        zoo=str(tmp_path / "zoo.yaml"),
        train="hypernetwork",
        fixed=fixed,
        space={"zoo.learning_rate": {"choice": [1e-3, 3e-3]}, RATE: SPACE[RATE]},
        num_trials=2,
        rungs=[0.5, 1.0],
        out=str(tmp_path / "out"),
    )
    with ray_of(1 + num_workers), pytest.raises(ConfigError, match=f"needs {2 + num_workers} CPUs"):
        tune(config)
    assert not (tmp_path / "out" / "trials").exists()
    with ray_of(2 + num_workers):
        result = tune(config)
    assert {row.status for row in result.rows} <= {"done", "stopped"}
    recipes = {row.knobs["zoo.learning_rate"] for row in result.rows}
    assert len([path for path in (tmp_path / "out" / "corpora").iterdir() if path.is_dir()]) == len(recipes)


def test_weak_members_of_a_population_go_on_from_strong_ones(zoo_corpus: Corpus, tmp_path: Path) -> None:
    config = tune_config(
        zoo_corpus,
        tmp_path,
        scheduler="pbt",
        space={RATE: {"loguniform": [1e-5, 1e-1]}},
        rungs=[0.25, 0.5, 0.75, 1.0],
        max_concurrent=0,
    )
    with ray_of(2):
        result = tune(config)
    assert [row.status for row in result.rows] == ["done"] * 4
    states = [TrialState.load(tmp_path / "trials" / row.trial) for row in result.rows]
    moved = [state for state in states if state is not None and state.generation > 0]
    assert moved
    for state in moved:
        assert f"/trials/{state.trial}/" not in state.start
        assert (Path(state.start) / "index.json").is_file()
        assert 1e-5 <= state.knobs[RATE] <= 1e-1
    with ray_of(1):
        assert facts(tune(config)) == facts(result)


def test_a_search_in_an_object_store_goes_on_after_a_kill(zoo_corpus: Corpus, bucket: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"fixed": {STEPS: 60}, "num_trials": 2}
    there = replace(tune_config(zoo_corpus, tmp_path / "here", **settings), out=f"{bucket}/search")
    process = subprocess.Popen(command(there, tmp_path / "there.yaml"), stdout=subprocess.DEVNULL)
    run = f"{there.out}/trials/000/run-0"
    while CheckpointManager(run).position() is None and process.poll() is None:
        time.sleep(0.05)
    assert process.poll() is None, "over before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert Storage.at(there.out).exists("search.jsonl")
    done = subprocess.run(command(there, tmp_path / "there.yaml"), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    with ray_of(1):
        here = tune(tune_config(zoo_corpus, tmp_path / "here", **settings))
        again = tune(there)
    assert facts(again) == facts(here)
    names = {name.rpartition("/")[2] for name in Storage.at(there.out).walk()}
    assert names >= {"config.yaml", "best.yaml", "trials.jsonl", "report.html", "search.jsonl", "trial.json", "rung-3"}
