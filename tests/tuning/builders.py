"""Searches small enough for a test, and their results."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raywgen.config import save_config
from raywgen.corpus import Corpus
from raywgen.tuning import TrialRow, TuneConfig, TuneResult
from raywgen.tuning.results import RungScore

STEPS = "train.generator.task_loss.num_steps"
RATE, WIDTH = "train.generator.task_loss.optimizer.learning_rate", "train.generator.width"
SPACE: dict[str, Any] = {
    RATE: {"loguniform": [1e-4, 1e-2]},
    WIDTH: {"choice": [8, 16]},
    "train.seed": {"int": [0, 5], "when": {WIDTH: 16}},
}


def tune_config(corpus: Corpus, out: Path, **changes: Any) -> TuneConfig:
    """A hypernetwork of one stage on the corpus of the tests."""
    fixed = {
        "train.num_workers": 0,
        "train.checkpoint_every": 2,
        "train.log_every": 1,
        "train.num_query_samples": 16,
        "train.generator.task_loss.num_steps": 24,
        "train.generator.task_loss.batch_size": 4,
    }
    settings: dict[str, Any] = {
        "corpus": corpus.location,
        "train": "hypernetwork",
        "fixed": fixed | changes.pop("fixed", {}),
        "space": SPACE,
        "num_trials": 4,
        "max_concurrent": 1,
        "out": str(out),
    }
    config = TuneConfig(**(settings | changes))
    config.objective.num_tasks, config.objective.best_of = 3, 1
    return config


def row(trial: str, scores: list[float], status: str = "stopped", **knobs: Any) -> TrialRow:
    """A trial of rungs of 10 steps each."""
    kept = tuple(RungScore(rung=i, score=score, steps=10 * i, seconds=1.0 * i) for i, score in enumerate(scores, 1))
    return TrialRow(trial=trial, status=status, scores=kept, knobs=knobs)


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
    return [sys.executable, "-m", "raywgen", "tune", str(path)]
