"""Adapters of causal language models: of a small one with its weights, and of large ones by their sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raywgen import inject
from raywgen.tasks import TaskError, build_network
from raywgen.tasks.networks.causal_lm import SIZES, causal_lm
from raywgen.tasks.networks.text_adapter import text_adapter
from raywgen.weights import Layout
from raywgen.weights.adapters import adapter_tensors, write_adapter

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def adapter(path: str, targets: list[str], rank: int = 8) -> dict[str, Any]:
    return {"name": "lora", "base": {"name": "causal-lm", "path": path}, "rank": rank, "targets": targets}


@pytest.fixture
def folder(tmp_path: Path) -> str:
    transformers: Any = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, vocab_size=30, initializer_range=0.2)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_what_is_written_is_what_peft_loads(folder: str, tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    recipe = adapter(folder, ["q_proj", "down_proj"], rank=2)
    network = build_network(recipe).eval()
    torch.manual_seed(1)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tokens_ST = torch.randint(30, (3, 7))
    with torch.no_grad():
        wanted_SV = network(tokens_ST.float())
        written, head = text_adapter(recipe, network.state_dict())
        assert not head
        where = write_adapter(written, tmp_path / "adapter")
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        before_SV = model(tokens_ST).logits[:, -1]
        assert torch.allclose(causal_lm(folder)(tokens_ST.float()), before_SV, atol=1e-5)
        assert (wanted_SV - before_SV).abs().max() > 0.05
        with inject(model, where):
            assert torch.allclose(model(tokens_ST).logits[:, -1], wanted_SV, atol=1e-5)
        loaded = peft.PeftModel.from_pretrained(model, str(where)).eval()
        assert loaded.peft_config["default"].task_type == "CAUSAL_LM"
        assert torch.allclose(loaded(tokens_ST).logits[:, -1], wanted_SV, atol=1e-5)


@pytest.mark.parametrize(
    ("base", "on_two", "on_all"),
    [
        ("llama-2-7b", 4_194_304, 19_988_480),
        ("llama-3-8b", 3_407_872, 20_971_520),
        ("mistral-7b", 3_407_872, 20_971_520),
        ("qwen2.5-7b", 2_523_136, 20_185_088),
    ],
)
@pytest.mark.slow
def test_large_models_are_known_by_their_sizes(base: str, on_two: int, on_all: int) -> None:
    """The numbers are those of rank 8 that Hu et al.'s equation 3 gives for the published sizes."""
    pytest.importorskip("transformers")
    for targets, wanted in ((["q_proj", "v_proj"], on_two), (["_proj"], on_all)):
        with torch.device("meta"):
            network = build_network(adapter(base, targets))
        assert Layout.from_state_dict(network.state_dict()).num_values == wanted


@pytest.mark.slow
def test_names_of_a_large_models_adapter_are_those_of_peft() -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    _, kind, sizes = SIZES["qwen2.5-7b"]
    with torch.device("meta"):
        network = build_network(adapter("qwen2.5-7b", ["q_proj", "v_proj"]))
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **sizes))
        config = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        theirs = peft.get_peft_model_state_dict(peft.get_peft_model(model, config))
    ours = adapter_tensors(text_adapter(adapter("qwen2.5-7b", []), network.state_dict())[0])
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: part.shape for name, part in theirs.items()}


def test_sizes_alone_are_no_weights() -> None:
    with pytest.raises(TaskError, match=r"is known by its sizes alone.*hf:mistralai"):
        causal_lm("mistral-7b")
    with pytest.raises(TaskError, match=r"llama-9b holds no config\.json"):
        causal_lm("llama-9b")
