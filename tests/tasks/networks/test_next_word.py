"""The upper layers of a causal language model, and adapters of them, judged by next-word loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from raywgen import inject
from raywgen.tasks import TaskError, build_network, stacked_logits
from raywgen.tasks.domain_texts import encode_texts
from raywgen.tasks.networks.next_word import NextWord
from raywgen.tasks.networks.text_adapter import text_adapter
from raywgen.tasks.networks.text_models import load_causal_model, load_tokenizer
from raywgen.weights.adapters import write_adapter
from tests.text_encoders import make_decoder, make_encoder

TEXTS = ["the old dog is very new", "song", "rain of the song is old the dog of rain is red very new of the song"]
TOKENS = 9


def whole(model: Any, path: str) -> Tensor:
    """Next-word loss of each text by the whole model."""
    losses = []
    for text in TEXTS:
        tokens_1T = torch.tensor([[0, *load_tokenizer(path)(text, add_special_tokens=False)["input_ids"]][:TOKENS]])
        losses.append(model(input_ids=tokens_1T, labels=tokens_1T).loss)
    return torch.stack(losses)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return make_decoder(tmp_path / "decoder")


@pytest.mark.parametrize("first_layer", [0, 2])
@torch.no_grad()
def test_the_loss_of_texts_is_that_of_the_whole_model(path: str, first_layer: int) -> None:
    network = build_network({"name": "next-word", "path": path, "first_layer": first_layer}).eval()
    outputs_S2 = network(encode_texts(TEXTS, path, first_layer, TOKENS))
    labels_S = torch.zeros(len(TEXTS), dtype=torch.int64)
    found_S = torch.nn.functional.cross_entropy(outputs_S2, labels_S, reduction="none")
    assert torch.allclose(found_S, whole(load_causal_model(path), path), atol=1e-5)
    assert torch.allclose(outputs_S2.exp().sum(dim=1), torch.ones(len(TEXTS)), atol=1e-5)


@torch.no_grad()
def test_peft_loads_an_adapter_that_changes_the_loss_as_ours_does(path: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = {"name": "next-word", "path": path, "first_layer": 1}
    recipe = {"name": "lora", "base": base, "rank": 2, "alpha": 4, "targets": ["v_proj", "down_proj"]}
    network = build_network(recipe).eval()
    torch.manual_seed(1)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    state_1 = {name: tensor.unsqueeze(0) for name, tensor in network.state_dict().items()}
    wanted_S = -stacked_logits(network, state_1, encode_texts(TEXTS, path, 1, TOKENS))[0, :, 0]
    adapter, head = text_adapter(recipe, network.state_dict())
    assert not head
    where = write_adapter(adapter, tmp_path / "adapter")
    model = load_causal_model(path)
    before_S = whole(model, path)
    assert (wanted_S - before_S).abs().min() > 0.01
    with inject(model, where):
        assert torch.allclose(whole(model, path), wanted_S, atol=1e-5)
    loaded = peft.PeftModel.from_pretrained(model, str(where)).eval()
    assert loaded.peft_config["default"].task_type == "CAUSAL_LM"
    assert torch.allclose(whole(loaded, path), wanted_S, atol=1e-5)


def test_models_of_other_kinds_are_named(path: str, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="first_layer=3: LlamaForCausalLM has layers 0 to 2"):
        build_network({"name": "next-word", "path": path, "first_layer": 3})
    with pytest.raises(TaskError, match="reads words that come later; give a causal language model"):
        build_network({"name": "next-word", "path": make_encoder(tmp_path / "encoder"), "first_layer": 1})
    with pytest.raises(TaskError, match="packaged is a sentence encoder; give the folder of a causal language model"):
        build_network({"name": "next-word", "path": "packaged", "first_layer": 1})
    with pytest.raises(TaskError, match=r"the language model .* has changed"):
        build_network({"name": "next-word", "path": path, "first_layer": 1, "digest": "0" * 12})


def test_a_model_that_does_more_after_its_last_layer_is_refused() -> None:
    transformers: Any = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.CohereConfig(**sizes, intermediate_size=32, vocab_size=30, logit_scale=0.2)
    model = transformers.CohereForCausalLM._from_config(config, attn_implementation="eager").eval()
    with pytest.raises(TaskError, match="more than a linear map after its last layer"):
        NextWord(model, 1)
