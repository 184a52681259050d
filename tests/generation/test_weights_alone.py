"""A generator trained on weights alone writes networks of the architectures in its corpus, and nothing is judged."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

import raywgen
from raywgen.config import ConfigError
from raywgen.corpus import Corpus, verify_corpus
from raywgen.generation import ConditionError, GenerateConfig, UnknownLayoutWarning, generate
from raywgen.generators import GenerationRequest
from raywgen.tasks import build_network
from raywgen.tasks.no_task import BLANK, blank_task
from raywgen.training import launch
from raywgen.training.rows import task_recipe
from raywgen.weights import Condition, KeyedNoise, load_state_dict
from tests.cli.test_use import output_of as shown_by
from tests.zoo.test_describe import NETWORKS, TASK, brought, run, with_description

__all__ = ["brought"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def trained(brought: Corpus) -> str:
    launch([run(brought, 0)])
    return run(brought, 0).out


def config(corpus: Corpus, trained: str, out: Path, **changes: Any) -> GenerateConfig:
    return GenerateConfig(generator=trained, corpus=corpus.location, out=str(out), **changes)


def test_each_architecture_is_written_by_the_condition_of_its_training(
    brought: Corpus, trained: str, tmp_path: Path
) -> None:
    rows = generate(config(brought, trained, tmp_path / "out", num=3, seed=2))
    assert [(row.network, row.draw) for row in rows] == [(n, d) for n in ("deep", "narrow") for d in range(3)]
    assert json.loads((tmp_path / "out" / "networks.json").read_text()) == [row.to_json() for row in rows]
    generator = raywgen.load(trained).generator
    for layout_id, network in brought.networks.items():
        recipe = task_recipe(brought, None, layout_id)
        assert recipe == {"name": BLANK, "instruction": network.name}
        task = blank_task()
        condition = Condition(
            instructions=(recipe["instruction"],) * 3,
            # Of a single sample any number of draws is the same to a set.
            samples_BSF=task.train_x_SF.expand(3, 8, 1),
            labels_BS=task.train_y_S.expand(3, 8),
        )
        written = generator.generate(
            GenerationRequest(
                condition=condition, layout=network.layout, noise=KeyedNoise(2, torch.arange(3)), temperature=0.5
            )
        )
        of_one = [row for row in rows if row.network == network.name]
        assert written.log_prob_B is not None
        assert [row.log_prob for row in of_one] == pytest.approx(written.log_prob_B.tolist(), rel=1e-5)
        for row, values_D in zip(of_one, written.values_BD, strict=True):
            state = load_state_dict(row.path)
            network.layout.check(state)
            torch.testing.assert_close(network.layout.flatten(state), values_D, rtol=1e-4, atol=1e-5)
            assert row.instruction == network.name
            assert (row.example_loss, row.test_accuracy) == (None, None)
            with safe_open(row.path, "pt") as file:
                assert float(file.metadata()["log_prob"]) == row.log_prob
    assert {Path(row.path).stem for row in rows} == {f"{n}_{d}" for n in ("narrow", "deep") for d in range(3)}


def test_a_corpus_of_them_can_be_trained_on_again(brought: Corpus, trained: str, tmp_path: Path) -> None:
    files = generate(config(brought, trained, tmp_path / "files", num=2))
    settings = config(brought, trained, tmp_path / "again", num=2, into="corpus")
    rows = generate(settings)
    assert generate(settings) == rows
    corpus = Corpus.open(tmp_path / "again")
    assert not verify_corpus(corpus.location)
    assert not corpus.tasks
    assert [row.checkpoint_id for row in rows] == ["deep/0", "deep/1", "narrow/0", "narrow/1"]
    for file, row in zip(files, rows, strict=True):
        assert dataclasses.replace(row, path=file.path) == dataclasses.replace(file, checkpoint_id=row.checkpoint_id)
        state = corpus.state_dict(row.checkpoint_id)
        assert all(torch.equal(tensor, state[name]) for name, tensor in load_state_dict(file.path).items())
    launch([dataclasses.replace(run(corpus, 0), out=str(tmp_path / "run"))])


def test_the_command_says_that_nothing_was_judged(brought: Corpus, trained: str, tmp_path: Path) -> None:
    settings = [f"generator={trained}", f"corpus={brought.location}", f"out={tmp_path / 'out'}", "network=deep"]
    shown = " ".join(shown_by("generate", *settings).split())
    assert "log-probability" in shown
    assert "deep.safetensors" in shown
    assert "Nothing was judged: no task is known" in shown


def test_what_needs_a_task_is_refused_by_name(brought: Corpus, trained: str, tmp_path: Path) -> None:
    for wrong, message in (
        ({"best_of": 4}, "best_of=4: no task is known.*corpus describe"),
        ({"num_unlabelled": 8}, "num_unlabelled=8: no task is known"),
        ({"tasks": "seen"}, "tasks=seen: .* knows no task; leave it out"),
        ({"network": "wide"}, "network=wide: .* has deep, narrow"),
    ):
        with pytest.raises(ConfigError, match=message):
            generate(config(brought, trained, tmp_path / "out", **wrong))
    np.savez(tmp_path / "mine.npz", x=np.zeros((4, 64), np.float32), y=np.array([0, 1, 0, 1]))
    mine = {"instruction": "Is it?", "data": str(tmp_path / "mine.npz")}
    with pytest.raises(ConditionError, match="trained on weights alone and takes no data"):
        generate(config(brought, trained, tmp_path / "out", **mine))
    assert not (tmp_path / "out").exists()


def test_a_module_is_filled_without_data(trained: str) -> None:
    module = build_network({"name": "mlp", "widths": [64, 6, 2]})
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    loaded = raywgen.load(trained)
    with warnings.catch_warnings():
        # Files hold tensors in the order of their names, a module in its own.
        warnings.simplefilter("error", UnknownLayoutWarning)
        filled = loaded.fill(module, instruction="narrow", seed=3)
    assert filled is module
    assert not any(torch.equal(tensor, before[name]) for name, tensor in filled.state_dict().items())
    again = loaded.fill(build_network({"name": "mlp", "widths": [64, 6, 2]}), instruction="narrow", seed=3)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in filled.state_dict().items())
    with pytest.raises(ConditionError, match="best_of=2: without data"):
        loaded.fill(module, best_of=2)
    with pytest.warns(UnknownLayoutWarning, match="judge the result on samples of yours"):
        loaded.fill(build_network({"name": "mlp", "widths": [64, 9, 2]}))


def test_an_architecture_of_ones_own_is_filled_with_a_warning(brought: Corpus, trained: str, tmp_path: Path) -> None:
    with pytest.warns(UnknownLayoutWarning):
        rows = generate(config(brought, trained, tmp_path / "out", networks=[[64, 9, 2], [64, 6, 2]]))
    layouts_and_instructions = [(row.known, row.instruction) for row in rows]
    assert layouts_and_instructions == [(False, "mlp-64-9-2"), (True, "mlp-64-6-2")]


def test_corpus_and_generator_must_know_the_same(brought: Corpus, trained: str, tmp_path: Path) -> None:
    plain = brought.location
    settings = config(brought, trained, tmp_path / "out")
    described = with_description(brought, TASK, NETWORKS)
    with pytest.raises(ConfigError, match=r"trained on weights alone, .* knows tasks; train it anew"):
        generate(settings)
    launch([run(described, 2)])
    of_tasks = run(described, 2).out
    assert described.location == plain
    with pytest.raises(ConditionError, match="data is missing"):
        raywgen.load(of_tasks).fill(build_network({"name": "mlp", "widths": [64, 6, 2]}), instruction="Is it?")


def test_tasks_without_recipes_are_conditions_but_not_tried(brought: Corpus, tmp_path: Path) -> None:
    corpus = with_description(brought, TASK)
    launch([run(corpus, 0)])
    settings = {"tasks": "seen", "network": "narrow"}
    (row,) = generate(config(corpus, run(corpus, 0).out, tmp_path / "out", **settings))
    assert (row.task, row.instruction) == ("digits", "Is it 1 or 4 or 7?")
    assert row.example_loss is None
    with pytest.raises(ConfigError, match="best_of=2: nothing says how to build narrow"):
        generate(config(corpus, run(corpus, 0).out, tmp_path / "more", best_of=2, **settings))


def test_a_generator_of_tasks_asks_for_one_where_the_corpus_knows_none(
    brought: Corpus, trained: str, tmp_path: Path
) -> None:
    written = generate(config(brought, trained, tmp_path / "weights", into="corpus"))
    assert written
    weights = Corpus.open(tmp_path / "weights")
    corpus = with_description(brought, TASK, NETWORKS)
    launch([run(corpus, 2)])
    with pytest.raises(ConfigError, match=r"trained on tasks, .* holds weights alone; say what to write for"):
        generate(config(weights, run(corpus, 2).out, tmp_path / "out"))
