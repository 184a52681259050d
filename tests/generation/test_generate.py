from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from raywgen.config import ConfigError, load_config
from raywgen.corpus import Corpus
from raywgen.generation import ConditionError, GenerateConfig, UnknownLayoutWarning, generate
from raywgen.generators.bundle import BundleError, build_generator, save_bundle
from raywgen.generators.common.tokenizer import TokenizerConfig
from raywgen.generators.igpg import IGPGConfig, PriorConfig
from raywgen.nn.quantisers import QuantiserConfig
from raywgen.out_folder import OutError
from raywgen.tasks import balanced_accuracy, build_network, build_task
from raywgen.tasks.standing import Standing, standing
from raywgen.training.data import data_spec, measure_normalizers
from raywgen.weights import load_state_dict
from tests.builders import normalizers

CONFIG = IGPGConfig(
    tokenizer=TokenizerConfig(quantiser=QuantiserConfig(num_levels=2, num_codes=8), width=16),
    prior=PriorConfig(width=16, num_layers=1, num_heads=2),
)


class WithNorm(nn.Sequential):
    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 2))


@pytest.fixture(scope="module")
def bundle(zoo_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A generator of the corpus' layouts, untrained; codebooks are random, so that its networks differ."""
    folder = tmp_path_factory.mktemp("bundle")
    generator = build_generator("igpg", CONFIG, measure_normalizers(zoo_corpus), data_spec(zoo_corpus), 0)
    codebooks = generator.get_buffer("tokenizer.quantiser.codebooks_LVK")
    codebooks.normal_(generator=torch.Generator().manual_seed(0))
    save_bundle(generator, folder, {})
    return str(folder)


def config(corpus: Corpus, bundle: str, out: Path, **changes: Any) -> GenerateConfig:
    return GenerateConfig(generator=bundle, corpus=corpus.location, out=str(out), best_of=2, **changes)


def test_every_unseen_task_gets_a_file_per_architecture(zoo_corpus: Corpus, bundle: str, tmp_path: Path) -> None:
    progress: list[tuple[int, int]] = []
    rows = generate(config(zoo_corpus, bundle, tmp_path), lambda *step: progress.append(step))
    unseen = {task.task_id for task in zoo_corpus.tasks.values() if task.split == "unseen"}
    names = {network.name for network in zoo_corpus.networks.values()}
    assert {(row.task, row.network) for row in rows} == {(task, name) for task in unseen for name in names}
    assert json.loads((tmp_path / "networks.json").read_text()) == [row.to_json() for row in rows]
    assert load_config(GenerateConfig, tmp_path / "config.yaml").best_of == 2
    assert progress[0] == (0, 8)
    assert progress[-1] == (8, 8)


def test_a_file_loads_strictly_and_scores_what_its_row_says(zoo_corpus: Corpus, bundle: str, tmp_path: Path) -> None:
    recipes = {network.name: network.recipe for network in zoo_corpus.networks.values()}
    for row in generate(config(zoo_corpus, bundle, tmp_path, limit=2)):
        module: nn.Module = build_network(recipes[row.network])
        module.load_state_dict(load_state_dict(row.path), strict=True)
        task = build_task(zoo_corpus.tasks[row.task].recipe)
        accuracy = balanced_accuracy(module(task.test_x_SF).unsqueeze(0), task.test_y_S)
        assert row.test_accuracy == pytest.approx(float(accuracy), abs=1e-6)
        with safe_open(row.path, "pt") as file:
            assert file.metadata()["instruction"] == zoo_corpus.tasks[row.task].instruction


def test_what_is_said_of_chance_knows_how_many_networks_were_tried(
    zoo_corpus: Corpus, bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best of many is above chance by chance."""
    budgets: list[int] = []

    def noted(
        logits_SC: torch.Tensor, labels_S: torch.Tensor, best_of: int = 1, linear: float | None = None
    ) -> Standing:
        budgets.append(best_of)
        return standing(logits_SC, labels_S, best_of, linear)

    monkeypatch.setattr("raywgen.generation.worker.standing", noted)
    generate(config(zoo_corpus, bundle, tmp_path, limit=1))
    assert budgets == [2, 2]


def test_one_task_by_its_id_and_one_architecture(zoo_corpus: Corpus, bundle: str, tmp_path: Path) -> None:
    task = next(iter(zoo_corpus.tasks))
    name = next(iter(zoo_corpus.networks.values())).name
    (row,) = generate(config(zoo_corpus, bundle, tmp_path, tasks=task, network=name))
    assert (row.task, row.network) == (task, name)


def test_a_task_of_the_users_own(zoo_corpus: Corpus, bundle: str, tmp_path: Path) -> None:
    task = zoo_corpus.tasks[next(iter(zoo_corpus.tasks))]
    np.savez(tmp_path / "mine.npz", x=task.samples_SF.view(-1, 8, 8).numpy(), y=task.labels_S.numpy())
    mine = {"instruction": "Is the digit one of 0 or 6?", "data": str(tmp_path / "mine.npz")}
    rows = generate(config(zoo_corpus, bundle, tmp_path / "out", **mine))
    assert [row.task for row in rows] == ["custom", "custom"]
    assert all(row.test_accuracy is None for row in rows)
    assert all(Path(row.path).is_file() for row in rows)


def test_architectures_that_no_generator_saw_are_filled_with_a_warning(
    zoo_corpus: Corpus, bundle: str, tmp_path: Path
) -> None:
    own = {"networks": [[64, 3, 2], {"name": "tests.generation.test_generate:WithNorm", "width": 5}, [64, 6, 2]]}
    with pytest.warns(UnknownLayoutWarning, match="never trained on") as warned:
        rows = generate(config(zoo_corpus, bundle, tmp_path, limit=2, **own))
    assert [one.filename for one in warned if one.category is UnknownLayoutWarning] == [__file__] * 2
    assert [row.known for row in rows] == [False] * 4 + [True] * 2
    for row in rows[2:4]:
        module = WithNorm(5).eval()
        module.load_state_dict(load_state_dict(row.path), strict=True)
        task = build_task(zoo_corpus.tasks[row.task].recipe)
        accuracy = balanced_accuracy(module(task.test_x_SF).unsqueeze(0), task.test_y_S)
        assert row.test_accuracy == pytest.approx(float(accuracy), abs=1e-6)


def test_statistics_are_estimated_anew_for_each_network_on_its_own_task(
    zoo_corpus: Corpus, bundle: str, tmp_path: Path
) -> None:
    networks = [{"name": "tests.generation.test_generate:WithNorm", "width": 5}]
    with pytest.warns(UnknownLayoutWarning):
        rows = generate(
            config(zoo_corpus, bundle, tmp_path / "anew", networks=networks, num=2, batch_size=6, num_unlabelled=10**6)
        )
    tasks = {row.task: build_task(zoo_corpus.tasks[row.task].recipe) for row in rows}
    assert len(tasks) == 4
    for row in rows:
        module = WithNorm(5)
        module.load_state_dict(load_state_dict(row.path), strict=True)
        hidden_SH = module[0](tasks[row.task].train_x_SF)
        norm = module[1]
        assert isinstance(norm, nn.BatchNorm1d)
        torch.testing.assert_close(norm.running_mean, hidden_SH.mean(dim=0), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(norm.running_var, hidden_SH.var(dim=0), rtol=1e-2, atol=1e-4)
    with pytest.raises(ValueError, match="num_unlabelled=1: statistics need at least 2"):
        GenerateConfig(num_unlabelled=1)


def test_a_task_and_an_architecture_of_ones_own_need_no_corpus(zoo_corpus: Corpus, bundle: str, tmp_path: Path) -> None:
    task = next(iter(zoo_corpus.tasks.values()))
    np.savez(tmp_path / "mine.npz", x=task.samples_SF.numpy(), y=task.labels_S.numpy())
    settings = GenerateConfig(
        generator=bundle,
        corpus=str(tmp_path / "none"),
        instruction="Is it?",
        data=str(tmp_path / "mine.npz"),
        networks=[[64, 3, 2]],
        out=str(tmp_path / "out"),
        best_of=1,
    )
    with pytest.warns(UnknownLayoutWarning):
        (first,) = generate(settings)
    before = load_state_dict(first.path)
    with pytest.warns(UnknownLayoutWarning):
        (second,) = generate(settings)
    assert all(torch.equal(tensor, before[name]) for name, tensor in load_state_dict(second.path).items())


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"no archive at all"])
def test_unreadable_examples_are_named(zoo_corpus: Corpus, bundle: str, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "mine.npz").write_bytes(content)
    with pytest.raises(ConditionError, match=r"mine\.npz.*arrays x"):
        generate(config(zoo_corpus, bundle, tmp_path, instruction="Is it?", data=str(tmp_path / "mine.npz")))


def test_examples_that_hold_pickled_code_are_refused_and_not_run(
    zoo_corpus: Corpus, bundle: str, tmp_path: Path
) -> None:
    mark = tmp_path / "was-run"

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return (mark.touch, ())

    np.savez(tmp_path / "mine.npz", x=np.array([Hostile()], dtype=object), y=np.zeros(1))
    with pytest.raises(ConditionError, match=r"mine\.npz"):
        generate(config(zoo_corpus, bundle, tmp_path, instruction="Is it?", data=str(tmp_path / "mine.npz")))
    assert not mark.exists()


def test_unknown_tasks_and_architectures_are_named(zoo_corpus: Corpus, bundle: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tasks=future.*did you mean 'unseen'.*unseen, validation, seen"):
        generate(config(zoo_corpus, bundle, tmp_path, tasks="future"))
    with pytest.raises(ConfigError, match=r"network=resnet.*mlp-64-6-2"):
        generate(config(zoo_corpus, bundle, tmp_path, network="resnet"))


def test_a_corpus_of_other_architectures_is_refused(zoo_corpus: Corpus, tmp_path: Path) -> None:
    save_bundle(build_generator("igpg", CONFIG, normalizers(), data_spec(zoo_corpus), 0), tmp_path, {})
    with pytest.raises(ConfigError, match="was never trained on it"):
        generate(config(zoo_corpus, str(tmp_path), tmp_path / "out"))


def test_no_generator_is_said(zoo_corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="raywgen train"):
        generate(config(zoo_corpus, str(tmp_path / "none"), tmp_path))


def test_a_folder_that_cannot_be_written_is_named(zoo_corpus: Corpus, bundle: str, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file, no folder")
    with pytest.raises(OutError, match=r"out is a file; name a folder"):
        generate(config(zoo_corpus, bundle, tmp_path / "out"))


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="best_of"):
        GenerateConfig(best_of=0)
    with pytest.raises(ValueError, match="belong together"):
        GenerateConfig(instruction="Is it?")
    with pytest.raises(ValueError, match="give one of them"):
        GenerateConfig(network="mlp-64-6-2", networks=[[64, 6, 2]])
