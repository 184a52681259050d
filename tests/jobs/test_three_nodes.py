"""Three nodes of different resources: corpus, training, search and generation, each a job of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import raywgen
from raywgen.config import load_config
from raywgen.corpus import Corpus
from raywgen.generators.igpg import IGPGConfig
from raywgen.training import TrainConfig, read_metrics
from raywgen.training.status import run_status
from tests.builders import settings_of
from tests.jobs.conftest import SMALL, LocalCluster, local_cluster

pytestmark = pytest.mark.slow

ZOO = ["networks=[[64,6,2]]", "num_seen_tasks=8", "num_validation_tasks=2", "num_unseen_tasks=2", "seeds_per_task=2"]
ZOO += ["num_steps=60", "checkpoint_steps=[50,60]", "num_condition_samples=32"]


@pytest.fixture(scope="module")
def three_nodes() -> Iterator[LocalCluster]:
    """Four CPUs in all, at most two on one node."""
    with local_cluster([{"num_cpus": 2}, {"num_cpus": 1}, {"num_cpus": 1, "fast_disk": 1}]) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What would be storage that all nodes mount."""
    return tmp_path_factory.mktemp("shared")


def run(cluster: LocalCluster, job: str, *arguments: str) -> str:
    done = cluster.run("raywgen", "job", "submit", job, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ": SUCCEEDED" in done.stdout
    return done.stdout


def test_from_corpus_to_generated_networks(three_nodes: LocalCluster, shared: Path) -> None:
    corpus, trained = shared / "corpus", shared / "igpg"
    run(three_nodes, "train_zoo", "digits", *ZOO, f"out={corpus}")
    zoo = Corpus.open(corpus)
    assert zoo.facts.num_rows == 1 + 12 * 2 * 2  # The shared start; tasks, seeds, checkpoints.

    run(three_nodes, "train", "configs/igpg/digits.yaml", f"corpus={corpus}", f"out={trained}", "zero_stage=2", *SMALL)
    assert run_status(trained).finished == ["tokenizer", "prior", "task_loss"]
    assert [row["step"] for row in read_metrics(trained) if row["stage"] == "prior"] == [0, 2]
    card = json.loads((trained / "generator" / "generator.json").read_text())
    assert str(corpus) in json.dumps(card)

    search = shared / "tune"
    rate = "train.generator.tokenizer.optimizer.learning_rate"
    fixed = {f"train.{key}": int(value) for key, value in (setting.split("=") for setting in SMALL)}
    settings = {"corpus": str(corpus), "train": "igpg", "out": str(search), "num_trials": 2}
    settings |= {"fixed": fixed | {"train.num_workers": 0}, "space": {rate: {"loguniform": [1e-3, 1e-2]}}}
    settings |= {"objective": {"num_tasks": 1, "best_of": 1}}
    (shared / "search.yaml").write_text(yaml.safe_dump(settings))
    run(three_nodes, "tune", str(shared / "search.yaml"))
    trials = [json.loads(line) for line in (search / "trials.jsonl").read_text().splitlines()]
    assert len(trials) == 2
    best = load_config(TrainConfig, search / "best.yaml")
    assert 1e-3 <= settings_of(best, IGPGConfig).tokenizer.optimizer.learning_rate <= 1e-2

    written = shared / "written"
    arguments = [f"generator={trained}", f"corpus={corpus}", "tasks=unseen", "best_of=2", "num=3", f"out={written}"]
    run(three_nodes, "generate", *arguments, "--where", "ray", "--into", "corpus")
    networks = Corpus.open(written)
    assert networks.facts.num_rows == 3 * 2  # Of each task.
    names = set(networks.facts.column_names)
    assert {"example_loss", "test_accuracy"} <= names
    assert raywgen.load(trained).generator.method == "igpg"
