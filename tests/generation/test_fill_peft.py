"""Models of PEFT, of which the adapter alone is filled."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import raywgen
from raywgen.generation import ChanceWarning, ConditionError, UnknownLayoutWarning
from raywgen.generation.stored_names import by_stored_names
from raywgen.generators.bundle import build_generator
from raywgen.generators.hypernetwork import HypernetworkConfig
from raywgen.generators.interface import DataSpec
from raywgen.weights import layout_normalizer

peft = pytest.importorskip("peft")


class Base(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = torch.nn.Linear(4, 6), torch.nn.Linear(6, 2)

    def forward(self, x_SF: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x_SF).relu())


def lora() -> torch.nn.Module:
    return peft.get_peft_model(Base(), peft.LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"]))


def test_the_adapter_of_a_peft_model_is_filled_and_its_base_stays(tmp_path: Path) -> None:
    model = lora()
    model.save_pretrained(str(tmp_path / "adapters/one"))  # pyright: ignore[reportCallIssue]
    files = load_file(tmp_path / "adapters/one/adapter_model.safetensors")
    assert {name: tensor.shape for name, tensor in by_stored_names(model).state_dict().items()} == {
        name: tensor.shape for name, tensor in files.items()
    }
    corpus = raywgen.build_corpus(tmp_path / "adapters", tmp_path / "corpus", distributed=False, quiet=True)
    (layout,) = (network.layout for network in corpus.networks.values())
    # The generator is one of adapters as the corpus holds them.
    normalizers = {layout.id: (layout, layout_normalizer(layout))}
    generator = raywgen.TrainedGenerator(
        build_generator(
            "hypernetwork", HypernetworkConfig(width=8), normalizers, DataSpec(num_features=4, max_classes=2), seed=0
        )
    )
    before, x_SF = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.randn(16, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnknownLayoutWarning)
        warnings.simplefilter("ignore", ChanceWarning)
        filled = generator.fill_with_report(model, instruction="Is it?", data=(x_SF, torch.arange(16) % 2))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if "lora_" in name or "head.modules_to_save" in name}
    assert filled.is_known
    # What is saved now is what was written, and PEFT puts it beside the base model again.
    model.save_pretrained(str(tmp_path / "two"))  # pyright: ignore[reportCallIssue]
    base = Base()
    base.load_state_dict({name: before[f"base_model.model.{_of_base(name)}"] for name in base.state_dict()})
    again = peft.PeftModel.from_pretrained(base, str(tmp_path / "two"))
    torch.testing.assert_close(again(x_SF), model(x_SF))


def _of_base(name: str) -> str:
    module, _, kind = name.partition(".")
    return f"{module}.{'base_layer' if module == 'body' else 'original_module'}.{kind}"


def test_an_adapter_that_is_no_part_of_the_model_is_one_sentence() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    base = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, vocab_size=16))
    model = peft.get_peft_model(base, peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))
    with pytest.raises(ConditionError, match=r"PeftModel.* has no tensor .*raywgen\.inject$"):
        by_stored_names(model)
