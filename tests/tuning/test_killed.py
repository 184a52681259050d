"""Searches that are killed go on where they were, and end as undisturbed ones."""

from __future__ import annotations

import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raywgen.config import ConfigError, load_config
from raywgen.corpus import Corpus
from raywgen.generators.hypernetwork import HypernetworkConfig
from raywgen.storage import Storage
from raywgen.training import TrainConfig, launch, read_metrics
from raywgen.training.checkpoints import CheckpointManager
from raywgen.tuning import tune
from tests.builders import settings_of
from tests.tuning.builders import RATE, STEPS, WIDTH, command, facts, ray_of, tune_config

pytestmark = pytest.mark.slow


def test_a_search_killed_in_a_trial_ends_as_an_undisturbed_one(zoo_corpus: Corpus, tmp_path: Path) -> None:
    fixed = {STEPS: 150}
    config = tune_config(zoo_corpus, tmp_path / "whole", fixed=fixed, num_trials=2)
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


def test_a_search_in_an_object_store_goes_on_after_a_kill(zoo_corpus: Corpus, bucket: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"fixed": {STEPS: 60}, "num_trials": 1}
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
