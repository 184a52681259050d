"""From sentences to adapters that PEFT loads: a small zoo, a generator through fitted heads, and folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raywgen.corpus import Corpus
from raywgen.generation import GenerateConfig, generate, load
from raywgen.generators.hypernetwork import HypernetworkConfig
from raywgen.generators.settings import StageConfig
from raywgen.tasks import balanced_accuracy, build_network, build_task
from raywgen.tasks.fitted_head import with_fitted_heads
from raywgen.tasks.networks.text_adapter import HEAD
from raywgen.tasks.networks.text_models import load_encoder_model, load_tokenizer
from raywgen.tasks.networks.upper_layers import mean_feature
from raywgen.training import TrainConfig, launch
from raywgen.weights.adapters import AdapterError, read_adapter
from raywgen.zoo import ZooConfig
from raywgen.zoo.config import ZooTasks
from tests.conftest import make_zoo
from tests.text_encoders import SIGNS, make_encoder, make_sentences

peft = pytest.importorskip("peft", reason="adapters are loaded by PEFT")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def corpus(folder: Path) -> Corpus:
    base = make_encoder(folder / "encoder")
    upper = {"name": "upper-layers", "path": base, "first_layer": 1, "num_classes": 2, "head": "fitted"}
    network = {"name": "lora", "base": upper, "rank": 2, "alpha": 6, "targets": ["query", "value"]}
    config = ZooConfig(
        tasks=ZooTasks(
            kind="sentence-groups",
            path=make_sentences(folder / "signs.parquet"),
            class_names=SIGNS,
            base=base,
            first_layer=1,
            max_tokens=8,
        ),
        networks=[network | {"train_head": ["classifier"]}],
        num_seen_tasks=6,
        num_validation_tasks=1,
        num_unseen_tasks=2,
        seeds_per_task=1,
        num_steps=20,
        checkpoint_steps=[10, 20],
        learning_rate=0.02,
        num_condition_samples=12,
        execution="sequential",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYWGEN_CACHE", str(folder / "cache"))
        return make_zoo(config, folder / "corpus")


@pytest.fixture(scope="module")
def run(corpus: Corpus, folder: Path) -> str:
    stage = StageConfig(num_steps=30, batch_size=4)
    config = TrainConfig(
        method="hypernetwork",
        generator=HypernetworkConfig(width=16, task_loss=stage),
        corpus=corpus.location,
        out=str(folder / "run"),
        num_workers=0,
        num_condition_samples=12,
        num_query_samples=12,
        validate_every=30,
    )
    launch([config])
    return config.out


def settings(corpus: Corpus, run: str, out: Path, **changes: Any) -> GenerateConfig:
    given = {"best_of": 2, "into": "adapters"} | changes
    return GenerateConfig(generator=run, corpus=corpus.location, out=str(out), **given)


def _state(folder: str) -> dict[str, torch.Tensor]:
    """The network's `state_dict`, from the two files of tensors."""
    factors = read_adapter(folder).factors
    state = {
        f"{name}.lora_{letter}": part for name, pair in factors.items() for letter, part in zip("AB", pair, strict=True)
    }
    return state | load_file(Path(folder) / HEAD)


def test_a_condition_holds_the_encoders_features_alone(corpus: Corpus, run: str) -> None:
    data = load(run).generator.data
    task = build_task(next(iter(corpus.tasks.values())).recipe)
    assert (data.num_features, data.num_sample_values) == (16, task.train_inputs.num_features)


def test_folders_hold_what_the_network_computes(corpus: Corpus, run: str, tmp_path: Path) -> None:
    rows = generate(settings(corpus, run, tmp_path))
    assert len(rows) == 2
    network = next(iter(corpus.networks.values()))
    base, module = network.recipe["base"]["path"], build_network(network.recipe).eval()
    for row in rows:
        head = load_file(Path(row.path) / HEAD)
        assert set(read_adapter(row.path).scales.values()) == {3.0}
        module.load_state_dict(_state(row.path), strict=True)
        task = build_task(corpus.tasks[row.task].recipe)
        accuracy = balanced_accuracy(module(task.test_x_SF).unsqueeze(0), task.test_y_S)
        assert row.test_accuracy == pytest.approx(float(accuracy), abs=1e-6)
        # The same through PEFT, from sentences on.
        sentences = ["old dog is new", "the red of the", "a song"]
        tokens = load_tokenizer(base)(sentences, padding="max_length", max_length=8, return_tensors="pt")
        is_real_ST = tokens["attention_mask"].bool()
        plain = load_encoder_model(base)
        with torch.no_grad():
            below = plain(**tokens, output_hidden_states=True)
            adapted = peft.PeftModel.from_pretrained(load_encoder_model(base), row.path).eval()(**tokens)
            feature_SH = mean_feature(adapted.last_hidden_state, is_real_ST)
            x_SF = torch.cat(
                [torch.zeros(3, 16), (below.hidden_states[1] * is_real_ST.unsqueeze(-1)).flatten(1)], dim=1
            )
            wanted_SC = module(x_SF)
        found_SC = feature_SH @ head["classifier.weight"].t() + head["classifier.bias"]
        assert torch.allclose(found_SC, wanted_SC, atol=1e-4)
        assert (adapted.last_hidden_state - below.last_hidden_state).abs().max() > 1e-3, "the adapter changes nothing"
    config = json.loads((Path(rows[0].path) / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(
        f"encoder.layer.{number}.attention.self.{part}" for number in (1, 2) for part in ("query", "value")
    )
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (2, 6.0, base)


def test_the_same_command_writes_the_same_files(corpus: Corpus, run: str, tmp_path: Path) -> None:
    first = generate(settings(corpus, run, tmp_path / "a"))
    again = generate(settings(corpus, run, tmp_path / "b"))
    for one, other in zip(first, again, strict=True):
        for file in Path(one.path).iterdir():
            assert file.read_bytes() == (Path(other.path) / file.name).read_bytes()


def test_heads_are_fitted_to_the_examples(corpus: Corpus, run: str, tmp_path: Path) -> None:
    network = next(iter(corpus.networks.values()))
    module = build_network(network.recipe).eval()
    for row in generate(settings(corpus, run, tmp_path)):
        values_1D = network.layout.flatten(_state(row.path)).unsqueeze(0)
        shown = corpus.tasks[row.task]
        again_1D, left_out_1SC = with_fitted_heads(
            module, network.layout, values_1D, shown.samples_SF.unsqueeze(0), shown.labels_S.unsqueeze(0)
        )
        assert torch.allclose(again_1D, values_1D, atol=1e-4)
        assert row.example_accuracy == pytest.approx(float(balanced_accuracy(left_out_1SC, shown.labels_S)))


def test_heads_are_fitted_where_networks_are_not_tried_too(corpus: Corpus, run: str, tmp_path: Path) -> None:
    tried = generate(settings(corpus, run, tmp_path / "tried", best_of=1))
    written = generate(settings(corpus, run, tmp_path / "written", best_of=1, try_on_samples=False))
    for one, other in zip(tried, written, strict=True):
        assert other.example_accuracy is None
        found, wanted = _state(other.path), _state(one.path)
        assert all(torch.allclose(tensor, wanted[name], atol=1e-6) for name, tensor in found.items())


def test_networks_of_other_kinds_are_named(corpus: Corpus, run: str, tmp_path: Path) -> None:
    plain = {"name": "mlp", "widths": [16 * 9, 4, 2]}
    with pytest.raises(AdapterError, match=r"into=adapters: network 'mlp-144-4-2' is no adapter of a text encoder"):
        generate(settings(corpus, run, tmp_path, networks=[plain]))
