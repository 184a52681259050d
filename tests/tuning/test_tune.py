"""Real searches by Ray Tune: begun, killed, begun again; with workers on the fewest CPUs; with a population."""

from __future__ import annotations

from pathlib import Path

import pytest

from raywgen.config import ConfigError, save_config
from raywgen.corpus import Corpus
from raywgen.tuning import TuneConfig, tune
from raywgen.tuning.results import TrialState
from tests.conftest import TINY_ZOO
from tests.tuning.builders import RATE, SPACE, STEPS, facts, ray_of, tune_config

pytestmark = pytest.mark.slow


def test_trials_of_workers_that_make_corpora_end_on_the_fewest_cpus(tmp_path: Path) -> None:
    num_workers = 2
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
        rungs=[1.0],
        out=str(tmp_path / "out"),
    )
    with ray_of(1 + num_workers), pytest.raises(ConfigError, match=f"needs {2 + num_workers} CPUs"):
        tune(config)
    assert not (tmp_path / "out" / "trials").exists()
    with ray_of(2 + num_workers):
        result = tune(config)
    assert [row.status for row in result.rows] == ["done", "done"]
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
