from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from raywgen.config import ConfigError, load_config
from raywgen.corpus import Corpus
from raywgen.evaluation.finetune import FinetuneConfig, finetune
from raywgen.generation import generate_best, load
from raywgen.generators.bundle import build_generator, save_bundle
from raywgen.generators.common.tokenizer import TokenizerConfig
from raywgen.generators.igpg import IGPGConfig, PriorConfig
from raywgen.nn.quantisers import QuantiserConfig
from raywgen.tasks import balanced_accuracy, balanced_cross_entropy, build_network, build_task
from raywgen.training.data import data_spec, measure_normalizers
from raywgen.weights import Condition, LayoutMismatchError, load_state_dict, save_state_dict

pytestmark = pytest.mark.usefixtures("one_thread")
NETWORK = "mlp-64-6-2"


def config(corpus: Corpus, out: Path, **changes: Any) -> FinetuneConfig:
    usual = {"network": NETWORK, "limit": 2, "epochs": 2, "learning_rates": [3e-3], "best_of": 2}
    return FinetuneConfig(corpus=corpus.location, out=str(out), **{**usual, **changes})


def test_every_kind_of_start_is_trained_and_written(zoo_corpus: Corpus, tmp_path: Path) -> None:
    small = IGPGConfig(
        tokenizer=TokenizerConfig(quantiser=QuantiserConfig(num_levels=2, num_codes=8), width=16),
        prior=PriorConfig(width=16, num_layers=1, num_heads=2),
    )
    bundle = build_generator("igpg", small, measure_normalizers(zoo_corpus), data_spec(zoo_corpus), 0)
    save_bundle(bundle, tmp_path / "generator", {})
    starts = ["generated", "nearest", "random", "shared"]
    out = tmp_path / "out"
    progress: list[tuple[int, int, str]] = []
    rows = finetune(config(zoo_corpus, out, start=starts, generator=str(tmp_path)), lambda *step: progress.append(step))
    assert [row.start for row in rows] == starts
    assert all(len(row.accuracy) == 3 for row in rows)
    assert progress[-1] == (16, 16, NETWORK)
    assert json.loads((out / "finetune.json").read_text()) == [asdict(row) for row in rows]
    assert load_config(FinetuneConfig, out / "config.yaml").start == starts
    recipe = next(network.recipe for network in zoo_corpus.networks.values() if network.name == NETWORK)
    for row in rows:
        for task_id, curve in row.tasks.items():
            module = build_network(recipe)
            file = f"{NETWORK}_{task_id}_{row.start}.safetensors".replace("/", "_")
            module.load_state_dict(load_state_dict(out / file), strict=True)
            task = build_task(zoo_corpus.tasks[task_id].recipe)
            accuracy = balanced_accuracy(module(task.test_x_SF).unsqueeze(0), task.test_y_S)
            # One of 597 images may cross the boundary by rounding.
            assert curve[-1] == pytest.approx(float(accuracy), abs=4e-3)


def test_generated_and_random_starts_are_the_best_of_n_on_the_examples(zoo_corpus: Corpus, tmp_path: Path) -> None:
    """What a rate of nearly 0 leaves as it was is the candidate with the lowest loss on the task's labelled samples."""
    small = IGPGConfig(
        tokenizer=TokenizerConfig(quantiser=QuantiserConfig(num_levels=2, num_codes=8), width=16),
        prior=PriorConfig(width=16, num_layers=1, num_heads=2),
    )
    generator = build_generator("igpg", small, measure_normalizers(zoo_corpus), data_spec(zoo_corpus), 0)
    with torch.no_grad():
        generator.get_submodule("tokenizer.quantiser").get_buffer("codebooks_LVK").normal_()
    save_bundle(generator, tmp_path / "generator", {})
    settings = config(
        zoo_corpus,
        tmp_path / "out",
        start=["generated", "random"],
        generator=str(tmp_path),
        best_of=4,
        epochs=1,
        learning_rates=[1e-9],
    )
    generated, random = finetune(settings)
    network = next(network for network in zoo_corpus.networks.values() if network.name == NETWORK)
    facts = [zoo_corpus.tasks[task_id] for task_id in random.tasks]
    condition = Condition(
        instructions=tuple(task.instruction for task in facts),
        samples_BSF=torch.stack([task.samples_SF for task in facts]),
        labels_BS=torch.stack([task.labels_S for task in facts]),
    )
    modules = []
    for seed in range(4):
        torch.manual_seed(seed)
        modules.append(build_network(network.recipe).eval())
    trained = load(str(tmp_path))
    guessed = trained.estimate_normalizer(network.layout, modules[0])
    best = generate_best(
        trained.generator,
        condition,
        network.layout,
        modules[0],
        best_of=4,
        temperature=settings.temperature,
        seed=settings.seed,
        normalizer=guessed,
    )
    for index, fact in enumerate(facts):
        task = build_task(fact.recipe)
        with torch.no_grad():
            losses = [float(balanced_cross_entropy(m(fact.samples_SF).unsqueeze(0), fact.labels_S)) for m in modules]
            written = build_network(network.recipe).eval()
            written.load_state_dict(network.layout.unflatten(best.values_BD[index]))
            expected = [modules[losses.index(min(losses))], written]
            for row, module in zip((random, generated), expected, strict=True):
                file = f"{NETWORK}_{task.id}_{row.start}.safetensors".replace("/", "_")
                found = load_state_dict(tmp_path / "out" / file)
                for name, tensor in module.state_dict().items():
                    torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)


def test_the_accuracy_to_reach_is_where_the_worst_start_ends(zoo_corpus: Corpus, tmp_path: Path) -> None:
    rows = finetune(config(zoo_corpus, tmp_path, start=["nearest", "random", "shared"]))
    ends = [[curve[-1] for curve in row.tasks.values()] for row in rows]
    worst = [min(of_task) for of_task in zip(*ends, strict=True)]
    assert worst != [max(of_task) for of_task in zip(*ends, strict=True)]
    for row in rows:
        assert row.wanted_accuracy == pytest.approx(sum(worst) / len(worst))
        assert row.share_reached == 1


def test_a_stored_start_is_what_the_generator_could_have_seen(zoo_corpus: Corpus, tmp_path: Path) -> None:
    """The nearest network of an unseen task is one of another task: its own were never shown."""
    (nearest,) = finetune(config(zoo_corpus, tmp_path, start="nearest", epochs=1))
    names = zoo_corpus.select(architecture=NETWORK, split="train", step=120)
    stored_RD = zoo_corpus.values(names)
    recipe = zoo_corpus.networks[names.column("layout_id")[0].as_py()].recipe
    for task_id, curve in nearest.tasks.items():
        task = build_task(zoo_corpus.tasks[task_id].recipe)
        accuracies = set()
        for values_D in stored_RD:
            module = build_network(recipe)
            module.load_state_dict(zoo_corpus.layout(names.column("layout_id")[0].as_py()).unflatten(values_D))
            accuracies.add(round(float(balanced_accuracy(module(task.test_x_SF).unsqueeze(0), task.test_y_S)), 4))
        assert round(curve[0], 4) in accuracies


def test_a_file_is_a_start_and_equals_the_start_it_was_written_from(zoo_corpus: Corpus, tmp_path: Path) -> None:
    layout_id, network = next((key, one) for key, one in zoo_corpus.networks.items() if one.name == NETWORK)
    base_D = zoo_corpus.base_values(layout_id)
    assert base_D is not None
    path = tmp_path / "mine.safetensors"
    save_state_dict(network.layout.unflatten(base_D), path, {})
    mine, shared = finetune(config(zoo_corpus, tmp_path / "out", start=[str(path), "shared"]))
    assert mine.tasks == shared.tasks
    assert mine.epochs == shared.epochs
    save_state_dict({"weight": torch.zeros(2, 2)}, path, {})
    with pytest.raises(LayoutMismatchError, match=r"mine\.safetensors"):
        finetune(config(zoo_corpus, tmp_path / "out", start=str(path)))


def test_epochs_are_counted_to_the_accuracy_asked_for(zoo_corpus: Corpus, tmp_path: Path) -> None:
    (easy,) = finetune(config(zoo_corpus, tmp_path, start="random", accuracy=0.01, epochs=1))
    assert (easy.epochs, easy.share_reached) == (0, 1)
    (hard,) = finetune(config(zoo_corpus, tmp_path, start="random", accuracy=1.0, epochs=1))
    assert (hard.epochs, hard.share_reached) == (None, 0)


def test_mistakes_are_named(zoo_corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"start=none: there is no such weights file.*generated, random"):
        finetune(config(zoo_corpus, tmp_path, start="none"))
    with pytest.raises(ConfigError, match="tasks=future"):
        finetune(config(zoo_corpus, tmp_path, start="random", tasks="future"))
    with pytest.raises(ConfigError, match="network=resnet"):
        finetune(config(zoo_corpus, tmp_path, start="random", network="resnet"))
    with pytest.raises(ValueError, match="each once"):
        FinetuneConfig(start=["random", "random"])
    with pytest.raises(ValueError, match="epochs=0"):
        FinetuneConfig(epochs=0)
