from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from raywgen.tasks import Task, TaskError, build_network, build_task, stacked_logits
from raywgen.tasks.networks.text_models import (
    encoder_digest,
    load_encoder_model,
    load_tokenizer,
)
from raywgen.tasks.networks.upper_layers import UpperLayers, mean_feature
from tests.text_encoders import NUM_LAYERS, SIGNS, WIDTH, make_encoder, make_sentences

TOKENS = 8
Recipe = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("texts")
    path, base = make_sentences(folder / "signs.parquet"), make_encoder(folder / "encoder")

    def make(**changes: Any) -> dict[str, Any]:
        shared = {"name": "sentence-groups", "path": path, "base": base, "class_names": SIGNS}
        return shared | {"groups": [[0, 3], [1]], "first_layer": 1, "max_tokens": TOKENS} | changes

    return make


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYWGEN_CACHE", str(tmp_path))


def outputs(sentences: list[str], base: str) -> tuple[Tensor, Tensor]:
    """The whole encoder's last hidden states, and which tokens are real, with padding to the longest sentence alone."""
    tokens = load_tokenizer(base)(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        return load_encoder_model(base)(**tokens).last_hidden_state, tokens["attention_mask"].bool()


def test_a_task_has_the_sentences_of_its_groups_alone(recipe: Recipe) -> None:
    task = build_task(recipe())
    assert task.instruction == "Is the sentence about dog and song, or about red?"
    assert (task.num_classes, task.num_condition_features) == (2, WIDTH)
    assert task.train_x_SF.shape == (60, WIDTH * (1 + TOKENS))
    assert task.train_y_S.bincount().tolist() == [40, 20]
    assert task.test_y_S.bincount().tolist() == [20, 10]
    other = build_task(recipe(groups=[[1], [2]]))
    assert other.train_inputs.x_XF is task.train_inputs.x_XF, "tasks of a data set share their samples"
    again = build_task(task.recipe)
    assert torch.equal(again.test_x_SF, task.test_x_SF)


def test_limits_are_of_the_data_and_equal_over_its_classes(recipe: Recipe) -> None:
    task = build_task(recipe(limit=12, test_limit=4, groups=[[0, 3], [1]]))
    assert task.train_y_S.bincount().tolist() == [6, 3]
    assert task.test_y_S.bincount().tolist() == [2, 1]


@pytest.mark.parametrize("first_layer", range(NUM_LAYERS))
def test_upper_layers_give_what_the_whole_encoder_gives(recipe: Recipe, first_layer: int) -> None:
    base = recipe()["base"]
    task = build_task(recipe(first_layer=first_layer, groups=[[0], [1, 2, 3]]))
    network = {"name": "upper-layers", "path": base, "first_layer": first_layer, "num_classes": 0}
    found_SH = build_network(network)(task.test_x_SF)
    table = pq.read_table(recipe()["path"]).to_pylist()
    sentences = [row["sentence"] for row in table if row["split"] == "test"]
    wanted_SH = mean_feature(*outputs(sentences, base))
    assert torch.allclose(found_SH, wanted_SH, atol=1e-5)
    assert torch.allclose(task.test_x_SF[:, :WIDTH], wanted_SH, atol=1e-5)
    names = [name for name, _ in build_network(network | {"num_classes": 3}).named_parameters()]
    assert names[-2:] == ["classifier.weight", "classifier.bias"]
    assert {name.split(".")[2] for name in names[:-2]} == {str(number) for number in range(first_layer, NUM_LAYERS)}


def test_stacked_networks_compute_what_each_computes(recipe: Recipe) -> None:
    task = build_task(recipe())
    network = {"name": "lora", "base": {"name": "upper-layers", "path": recipe()["base"], "first_layer": 1}}
    module = build_network(network | {"rank": 2, "targets": ["query", "value"], "train_head": ["classifier"]}).eval()
    torch.manual_seed(0)
    state_N = {name: torch.randn(3, *tensor.shape) for name, tensor in module.state_dict().items()}
    found = stacked_logits(module, state_N, task.test_x_SF[:5])
    for number in range(3):
        module.load_state_dict({name: tensor[number] for name, tensor in state_N.items()})
        assert torch.allclose(module(task.test_x_SF[:5]), found[number], atol=1e-4)
    assert (found[0] - found[1]).abs().max() > 0.1


def test_long_sentences_are_cut(recipe: Recipe) -> None:
    task: Task = build_task(recipe(max_tokens=4))
    hidden_STH = task.test_x_SF.unflatten(1, (-1, WIDTH))[:, 1:]
    assert hidden_STH.shape[1] == 4
    assert bool((hidden_STH != 0).any(dim=-1).all())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": [[0], [0, 1]]}, "none in two"),
        ({"groups": [[0, 1]]}, "give two or more sets"),
        ({"groups": [[0], [4]]}, "has no class 4; it has 0 to 3"),
        ({"class_names": ["dog"]}, "has 4 classes; name each"),
        ({"first_layer": NUM_LAYERS}, "has layers 0 to 2"),
        ({"max_tokens": 2}, "give at least 3"),
        ({"base": "nowhere"}, r"nowhere holds no config\.json"),
        ({"digest": "123456789abc"}, "has changed: its weights are"),
    ],
)
def test_what_cannot_be_a_task_is_named(recipe: Recipe, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        build_task(recipe(**changes))


def test_an_encoder_that_changed_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    base = make_encoder(tmp_path / "encoder")
    kept = recipe(base=base, digest=encoder_digest(base))
    build_task(kept)
    weights = load_file(tmp_path / "encoder" / "model.safetensors")
    weights["encoder.layer.2.output.dense.bias"] += 1
    save_file(weights, tmp_path / "encoder" / "model.safetensors", {"format": "pt"})
    encoder_digest.cache_clear()
    with pytest.raises(TaskError, match=r"has changed: its weights are \w{12}, and what was made by it says \w{12}"):
        build_task(kept | {"groups": [[0], [1]]})
    network = {"name": "upper-layers", "path": base, "digest": kept["digest"]}
    with pytest.raises(TaskError, match="has changed"):
        build_network(network)


SIZES = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
KINDS: dict[str, dict[str, Any]] = {
    "Bert": {},
    "Roberta": {},
    "Electra": {"embedding_size": 16},
    "DistilBert": {"dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 24},
    "MPNet": {},
    "ModernBert": {f"{name}_token_id": number for number, name in enumerate(("pad", "eos", "bos", "cls", "sep"))},
    "Llama": {},
    "Qwen2": {"num_key_value_heads": 1},
    "Gemma2": {"num_key_value_heads": 1, "head_dim": 8},
}


def model_of(kind: str, **settings: Any) -> nn.Module:
    """A model of transformers with random values that are large enough to differ."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 20} if kind in ("DistilBert", "GPT2") else SIZES
    config = getattr(transformers, f"{kind}Config")(**(sizes | settings))
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_many_kinds_of_models_can_be_entered_at_a_layer(kind: str) -> None:
    model = model_of(kind, **KINDS[kind])
    ids_ST = torch.randint(5, 20, (3, 6), generator=torch.Generator().manual_seed(0))
    is_real_ST = torch.arange(6) < torch.tensor([[6], [4], [1]])
    with torch.no_grad():
        output = model(input_ids=ids_ST, attention_mask=is_real_ST.long(), output_hidden_states=True)
        below_STH = output.hidden_states[1] * is_real_ST.unsqueeze(-1)
        wanted_SH = mean_feature(output.last_hidden_state, is_real_ST)
        names = {name for name in model.state_dict() if "pooler" not in name}
        upper = UpperLayers(model, 1, 0)
        found_SH = upper(torch.cat([torch.zeros(3, 16), below_STH.flatten(1)], dim=1))
    assert torch.allclose(found_SH, wanted_SH, atol=1e-5)
    assert set(upper.state_dict()) < names


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("GPT2", {"n_embd": 16, "n_layer": 3, "n_head": 2}, "GPT2Model cannot be entered at a layer; give a BERT"),
        ("DebertaV2", {}, "DebertaV2Model cannot be entered at a layer"),
        ("Albert", {"embedding_size": 8}, "AlbertModel has no list of 3 layers"),
    ],
)
def test_other_kinds_are_refused(kind: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        UpperLayers(model_of(kind, **settings), 1, 0)
