"""The user's word reaches whoever needs it: commands, and processes of Ray; and nobody beyond."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn
from typer.testing import CliRunner

from raywgen.cli import app
from raywgen.corpus import Corpus
from raywgen.generation import GenerateConfig, generate
from raywgen.training import TrainConfig, launch
from raywgen.trust import UntrustedError, trusting
from raywgen.zoo import ZooConfig, train_zoo
from tests.builders import igpg_config
from tests.security.hostile import Payload, hostile_corpus

HERE = "tests.security.test_trust_reaches"


class Marked(nn.Sequential):
    """Leaves the number of the process in which it is built."""

    def __init__(self, mark: str) -> None:
        with Path(mark).open("a") as file:
            file.write(f"{os.getpid()}\n")
        super().__init__(nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 2))


def processes(mark: Path) -> set[int]:
    """Other processes in which a network was built."""
    return {int(line) for line in mark.read_text().split()} - {os.getpid()}


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    import ray

    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def marked(zoo_corpus: Corpus, tmp_path: Path) -> Corpus:
    network = {"name": f"{HERE}:Marked", "mark": str(tmp_path / "mark")}
    return hostile_corpus(zoo_corpus, tmp_path / "corpus", network=network)


@pytest.mark.usefixtures("ray_session")
def test_it_reaches_actors_that_generate(marked: Corpus, bundle: Path, tmp_path: Path) -> None:
    config = GenerateConfig(
        corpus=marked.location, generator=str(bundle), out=str(tmp_path / "out"), limit=1, best_of=1, where="ray"
    )
    with pytest.raises(UntrustedError, match=f"{HERE}:Marked.*{marked.location}"):
        generate(config)
    with trusting(HERE):
        assert generate(config)
    assert processes(tmp_path / "mark")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_zoo_of_ones_own_networks_needs_no_flag_on_workers(tmp_path: Path) -> None:
    network = {"name": f"{HERE}:Marked", "mark": str(tmp_path / "mark")}
    zoo = ZooConfig(networks=[network], num_steps=2, checkpoint_steps=[2], num_condition_samples=8, seeds_per_task=1)
    zoo.num_seen_tasks, zoo.num_validation_tasks, zoo.num_unseen_tasks = 2, 0, 0
    assert train_zoo(zoo, str(tmp_path / "zoo")).facts.num_rows
    assert processes(tmp_path / "mark")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_it_reaches_workers_that_train(marked: Corpus, tmp_path: Path) -> None:
    generator = igpg_config()
    for stage in vars(generator).values():
        if hasattr(stage, "num_steps"):
            stage.num_steps, stage.batch_size = 1, 4
    run = TrainConfig(corpus=marked.location, out=str(tmp_path / "run"), generator=generator, num_workers=2)
    with trusting(HERE):
        launch([run])
    assert processes(tmp_path / "mark")


def command(corpus: Corpus, bundle: Path, out: Path, *more: str) -> list[str]:
    return ["generate", f"corpus={corpus.location}", f"generator={bundle}", f"out={out}", "limit=1", "best_of=1", *more]


def test_a_flag_lets_a_command_import(zoo_corpus: Corpus, bundle: Path, payload: Payload, tmp_path: Path) -> None:
    corpus = hostile_corpus(zoo_corpus, tmp_path / "corpus", network={"name": f"{payload.name}:Net"})
    refused = CliRunner().invoke(app, command(corpus, bundle, tmp_path / "out"))
    assert isinstance(refused.exception, UntrustedError)
    others = CliRunner().invoke(app, command(corpus, bundle, tmp_path / "out", "--trust", "numpy"))
    assert isinstance(others.exception, UntrustedError)
    assert payload.name not in sys.modules
    done = CliRunner().invoke(
        app, command(corpus, bundle, tmp_path / "out", "--trust", "numpy", "--trust", payload.name)
    )
    assert done.exit_code == 0, done.output
    assert "built" in payload.has_run
    again = CliRunner().invoke(app, command(corpus, bundle, tmp_path / "again"))
    assert isinstance(again.exception, UntrustedError), "the flag counts for its own command alone"


@pytest.mark.parametrize(
    "name",
    [
        *("zoo train", "train", "generate", "adapt", "evaluate", "score", "retrieve", "select", "finetune", "tune"),
        *("corpus describe", "corpus align"),
    ],
)
def test_commands_that_read_recipes_take_the_flag(name: str) -> None:
    assert "--trust" in CliRunner().invoke(app, [*name.split(), "--help"], env={"COLUMNS": "200"}).output
    refused = CliRunner().invoke(app, [*name.split(), *_NEEDED.get(name, []), "--trust", "*"])
    assert isinstance(refused.exception, UntrustedError)


_NEEDED = {
    "adapt": ["run", "--support", "examples.npz"],
    "score": ["net.pt", "--corpus", "corpus", "--task", "task"],
    "retrieve": ["corpus"],
    "select": ["corpus"],
    "corpus describe": ["corpus", "networks.yaml"],
    "corpus align": ["corpus", "aligned"],
}
