from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from raywgen.config import ConfigError, load_config
from raywgen.corpus import BuildConfig, Corpus, UnknownFactError, build_corpus
from raywgen.evaluation.request import TaskRequest, read_samples, read_task_request
from raywgen.evaluation.retrieve import RetrieveConfig, nearest, retrieve
from raywgen.evaluation.stored_scores import stored_scores, trained_ends
from raywgen.evaluation.task_similarity import data_similarity, text_similarity
from raywgen.generation import ConditionError
from raywgen.tasks import balanced_accuracy, balanced_cross_entropy, build_network, build_task
from raywgen.tasks.images import load_images
from raywgen.weights import load_state_dict, save_state_dict
from raywgen.zoo import ZooConfig
from raywgen.zoo.config import ZooTasks
from tests.conftest import make_zoo
from tests.networks_held import NetworksHeld

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_network_of_the_very_task_is_found_by_its_samples_alone(zoo_corpus: Corpus) -> None:
    for task in list(zoo_corpus.tasks.values())[:6]:
        request = TaskRequest(instruction="", samples_SF=task.samples_SF, labels_S=task.labels_S)
        found = nearest(zoo_corpus, request, top=1)
        assert found.by == "loss"
        assert found.networks[0].task_id == task.task_id


def test_the_network_of_the_very_task_is_found_by_its_instruction_alone(zoo_corpus: Corpus) -> None:
    for task in list(zoo_corpus.tasks.values())[:6]:
        found = nearest(zoo_corpus, TaskRequest(instruction=task.instruction), top=2)
        assert found.by == "similarity"
        assert {network.task_id for network in found.networks} == {task.task_id}
        # The cosine of equal vectors, in float32.
        assert found.networks[0].text_similarity == pytest.approx(1.0, abs=1e-6)
        assert found.networks[0].loss is None


def test_scores_equal_those_of_one_network_at_a_time(zoo_corpus: Corpus) -> None:
    task = next(iter(zoo_corpus.tasks.values()))
    found = nearest(
        zoo_corpus, TaskRequest(instruction="", samples_SF=task.samples_SF, labels_S=task.labels_S), top=1000
    )
    recipes = {network.name: network.recipe for network in zoo_corpus.networks.values()}
    assert found.num_tried == len(found.networks) == trained_ends(zoo_corpus, []).num_rows
    for network in found.networks[::7]:
        module = build_network(recipes[network.architecture]).eval()
        module.load_state_dict(zoo_corpus.state_dict(network.checkpoint_id))
        logits = module(task.samples_SF).unsqueeze(0).detach()
        assert network.loss == pytest.approx(float(balanced_cross_entropy(logits, task.labels_S)), abs=1e-5)
        assert network.accuracy == pytest.approx(float(balanced_accuracy(logits, task.labels_S)), abs=1e-6)
    losses = [network.loss or 0.0 for network in found.networks]
    assert losses == sorted(losses)


def test_by_accuracy_the_most_accurate_comes_first_and_of_equals_the_lower_loss(zoo_corpus: Corpus) -> None:
    task = next(iter(zoo_corpus.tasks.values()))
    request = TaskRequest(instruction="", samples_SF=task.samples_SF, labels_S=task.labels_S)
    found = nearest(zoo_corpus, request, by="accuracy", top=1000)
    order = [(-(network.accuracy or 0.0), network.loss or 0.0) for network in found.networks]
    assert order == sorted(order)
    assert order[0][0] < order[-1][0]


def test_scores_do_not_depend_on_how_many_networks_are_run_at_once(
    zoo_corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = next(iter(zoo_corpus.tasks.values()))
    rows = trained_ends(zoo_corpus, ["architecture=mlp-64-6-2"]).slice(0, 5)
    arguments = (zoo_corpus, rows, task.samples_SF, task.labels_S)
    loss_N, accuracy_N = stored_scores(*arguments)
    monkeypatch.setattr("raywgen.corpus.at_once._NETWORKS", 2)
    few_loss_N, few_accuracy_N = stored_scores(*arguments)
    torch.testing.assert_close(few_loss_N, loss_N)
    torch.testing.assert_close(few_accuracy_N, accuracy_N)
    assert len(loss_N.unique()) == 5


def test_only_ends_of_trajectories_are_compared(zoo_corpus: Corpus) -> None:
    ends = trained_ends(zoo_corpus, [])
    assert set(ends.column("step").to_pylist()) == {120}
    assert set(ends.column("split").to_pylist()) == {"train", "heldout", "validation", "unseen"}
    assert len(set(ends.column("trajectory_id").to_pylist())) == ends.num_rows


def test_facts_narrow_the_search(zoo_corpus: Corpus) -> None:
    unseen = next(task for task in zoo_corpus.tasks.values() if task.split == "unseen")
    request = TaskRequest(instruction=unseen.instruction, samples_SF=unseen.samples_SF, labels_S=unseen.labels_S)
    found = nearest(zoo_corpus, request, where=["split=train", "architecture=mlp-64-6-2"], top=1000)
    assert {network.architecture for network in found.networks} == {"mlp-64-6-2"}
    assert unseen.task_id not in {network.task_id for network in found.networks}
    assert found.num_tried == 12
    with pytest.raises(ConditionError, match="loosen"):
        nearest(zoo_corpus, request, where=["architecture=none"])


def test_what_is_not_finite_has_an_infinite_loss(zoo_corpus: Corpus) -> None:
    task = next(iter(zoo_corpus.tasks.values()))
    rows = trained_ends(zoo_corpus, ["architecture=mlp-64-6-2"]).slice(0, 3)
    huge = torch.full_like(task.samples_SF, 1e38)
    loss_N, _ = stored_scores(zoo_corpus, rows, huge * 10, task.labels_S)
    assert bool((loss_N == torch.inf).all())


def test_the_best_is_written_bit_for_bit_with_all_that_was_found(zoo_corpus: Corpus, tmp_path: Path) -> None:
    task = next(iter(zoo_corpus.tasks))
    out = tmp_path / "best.safetensors"
    found = retrieve(RetrieveConfig(corpus=zoo_corpus.location, task=task, out=str(out), top=3))
    stored = zoo_corpus.state_dict(found.networks[0].checkpoint_id)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in load_state_dict(out).items())
    content = json.loads((tmp_path / "best.json").read_text())
    assert [row["checkpoint_id"] for row in content["found"]["networks"]] == [n.checkpoint_id for n in found.networks]
    assert content["config"]["task"] == task


def test_samples_come_from_a_file_with_or_without_labels(zoo_corpus: Corpus, tmp_path: Path) -> None:
    task = next(iter(zoo_corpus.tasks.values()))
    x, y = task.samples_SF.view(-1, 8, 8).numpy(), task.labels_S.numpy()
    np.savez(tmp_path / "labelled.npz", x=x, y=y)
    np.savez(tmp_path / "plain.npz", x=x)
    settings: dict[str, Any] = {"corpus": zoo_corpus.location, "out": ""}
    labelled = retrieve(RetrieveConfig(**settings, data=str(tmp_path / "labelled.npz")))
    assert (labelled.by, labelled.networks[0].task_id) == ("loss", task.task_id)
    plain = retrieve(RetrieveConfig(**settings, data=str(tmp_path / "plain.npz")))
    assert (plain.by, plain.networks[0].task_id) == ("similarity", task.task_id)
    assert plain.networks[0].data_similarity == pytest.approx(1.0)
    with pytest.raises(ConditionError, match="needs labelled samples"):
        retrieve(RetrieveConfig(**settings, data=str(tmp_path / "plain.npz"), by="loss"))


def test_images_are_read_as_the_corpus_networks_take_them(tmp_path: Path) -> None:
    """A folder of class folders, and an `.npz` of pixels, both standardised as the zoo's own training images."""
    generator = np.random.default_rng(0)
    for number in range(12):
        pixels = generator.integers(0, 100, (4, 4), dtype=np.uint8) + 150 * (number % 2)
        folder = tmp_path / "images" / f"class-{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:02}.png")
    zoo = ZooConfig(
        tasks=ZooTasks(kind="images", path=str(tmp_path / "images")),
        networks=[[16, 3, 2]],
        num_seen_tasks=1,
        num_validation_tasks=0,
        num_unseen_tasks=0,
        seeds_per_task=2,
        num_steps=4,
        checkpoint_steps=[4],
        num_condition_samples=4,
    )
    corpus = make_zoo(zoo, tmp_path / "corpus")
    task = build_task(next(iter(corpus.tasks.values())).recipe)
    request = read_task_request(corpus, task="", instruction="", data=str(tmp_path / "images"), num_samples=100)
    assert request.samples_SF is not None
    assert request.labels_S is not None
    assert request.labels_S.tolist() == [0] * 6 + [1] * 6
    known_SF = torch.cat([task.train_x_SF, task.test_x_SF])
    # Means and deviations are summed in another order: the last bits differ.
    assert float(torch.cdist(request.samples_SF, known_SF).min(dim=1).values.max()) < 1e-4
    data = load_images(str(tmp_path / "images"))
    np.savez(tmp_path / "pixels.npz", x=data.x_SCHW.numpy(), y=data.y_S.numpy())
    again, _ = read_samples(corpus, str(tmp_path / "pixels.npz"))
    assert torch.equal(again, request.samples_SF)


def test_fewer_samples_keep_their_classes(zoo_corpus: Corpus) -> None:
    task = next(iter(zoo_corpus.tasks))
    request = read_task_request(zoo_corpus, task=task, instruction="", data="", num_samples=6)
    assert request.labels_S is not None
    assert request.labels_S.bincount().tolist() == [3, 3]


def test_what_is_missing_is_said(zoo_corpus: Corpus, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"corpus": zoo_corpus.location, "out": ""}
    with pytest.raises(ConditionError, match="give either"):
        retrieve(RetrieveConfig(**settings))
    with pytest.raises(ConditionError, match="give either"):
        retrieve(RetrieveConfig(**settings, task="digits/1", instruction="Is it?"))
    with pytest.raises(UnknownFactError, match="no task 'none'"):
        retrieve(RetrieveConfig(**settings, task="none"))
    with pytest.raises(ConfigError, match="by=best"):
        load_config(RetrieveConfig, None, ["by=best"])
    np.savez(tmp_path / "wrong.npz", x=np.zeros((3, 7), dtype=np.float32), y=np.array([0, 1, 1]))
    with pytest.raises(ConditionError, match=r"7 values.*have 64"):
        retrieve(RetrieveConfig(**settings, data=str(tmp_path / "wrong.npz")))
    np.savez(tmp_path / "classes.npz", x=np.zeros((3, 64), dtype=np.float32), y=np.array([0, 1, 5]))
    with pytest.raises(ConditionError, match="labels go up to 5"):
        retrieve(RetrieveConfig(**settings, data=str(tmp_path / "classes.npz")))


def test_a_corpus_without_tasks_and_modules_says_what_it_lacks(zoo_corpus: Corpus, tmp_path: Path) -> None:
    name = trained_ends(zoo_corpus, []).column("checkpoint_id")[0].as_py()
    save_state_dict(zoo_corpus.state_dict(name), tmp_path / "files" / "net.safetensors", {})
    build_corpus(BuildConfig(out=str(tmp_path / "corpus"), sources=[str(tmp_path / "files")], distributed=False))
    settings: dict[str, Any] = {"corpus": str(tmp_path / "corpus"), "out": ""}
    with pytest.raises(ConditionError, match="does not say what its networks were trained for"):
        retrieve(RetrieveConfig(**settings, instruction="Is it?"))
    np.savez(tmp_path / "x.npz", x=np.zeros((2, 64), dtype=np.float32), y=np.array([0, 1]))
    with pytest.raises(ConditionError, match="not what its module is"):
        retrieve(RetrieveConfig(**settings, data=str(tmp_path / "x.npz")))


def test_text_similarity_is_the_cosine_of_weighted_words() -> None:
    stored = ["is it a cat", "is it a dog", "is it a 4", "no word in common"]
    similarity = text_similarity("is it a 4", stored)
    assert similarity[2] == pytest.approx(1.0, abs=1e-6)
    assert similarity[3] == 0
    assert 0 < similarity[0] == pytest.approx(float(similarity[1]))
    assert text_similarity("?", ["!"]).tolist() == [0]


def test_data_similarity_is_one_over_one_plus_the_frechet_distance() -> None:
    generator = torch.Generator().manual_seed(0)
    stored = [torch.randn(50, 3, generator=generator) * scale + shift for scale, shift in ((1, 0), (2, 1), (1, 4))]
    request = torch.randn(40, 3, generator=generator)
    variance = torch.cat(stored).numpy().var(axis=0)
    for similarity, samples in zip(data_similarity(request, stored), stored, strict=True):
        mean, std = samples.numpy().mean(axis=0), samples.numpy().std(axis=0)
        offset = (mean - request.numpy().mean(axis=0)) ** 2 + (std - request.numpy().std(axis=0)) ** 2
        assert float(similarity) == pytest.approx(float(1 / (1 + (offset / variance).mean())), rel=1e-4)
    assert data_similarity(stored[1], stored).argmax() == 1


def test_no_more_networks_are_held_than_are_run_together(zoo_corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raywgen.corpus.at_once._NETWORKS", 3)
    task = next(iter(zoo_corpus.tasks.values()))
    request = TaskRequest(instruction="", samples_SF=task.samples_SF, labels_S=task.labels_S)
    with NetworksHeld([network.layout for network in zoo_corpus.networks.values()]) as held:
        found = nearest(zoo_corpus, request, top=1)
    assert found.num_tried > 3
    assert held.most == 3, held.function
