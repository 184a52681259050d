from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raywgen.weights.adapters import CONFIG, TENSORS, AdapterError, LoRAAdapter, inject, read_adapter, write_adapter
from raywgen.weights.files import load_state_dict, save_state_dict

peft = pytest.importorskip("peft", reason="adapters are compared with PEFT's own")
transformers: Any = pytest.importorskip("transformers")

IDS = torch.arange(6).view(2, 3) + 1
SIZES = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**SIZES))


def classifier() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, num_labels=3))


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=1))


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2))


# Model, task of PEFT, its modules, and modules that are saved whole.
CASES: dict[str, tuple[Callable[[], nn.Module], str, list[str], list[str]]] = {
    "encoder": (bert, "FEATURE_EXTRACTION", ["query", "value"], []),
    "classification": (classifier, "SEQ_CLS", ["query", "output.dense"], ["classifier"]),
    "causal": (llama, "CAUSAL_LM", ["q_proj", "down_proj"], []),
    "transposed": (gpt2, "CAUSAL_LM", ["c_attn", "c_proj"], []),
}
each_case = pytest.mark.parametrize("case", CASES)


def built(case: str) -> nn.Module:
    torch.manual_seed(0)
    return CASES[case][0]().eval()


def output(module: nn.Module) -> Tensor:
    with torch.no_grad():
        return module(input_ids=IDS)[0]


def peft_folder(case: str, folder: Path, **settings: Any) -> Tensor:
    """Has PEFT write an adapter with values of its own, and returns what its model computes."""
    _, task, targets, whole = CASES[case]
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=targets, task_type=task, modules_to_save=whole or None, **settings
    )
    model = peft.get_peft_model(built(case), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return output(model)


@each_case
def test_an_adapter_of_peft_is_taken_up_and_given_back(case: str, tmp_path: Path) -> None:
    wanted, module = peft_folder(case, tmp_path), built(case)
    before, own = output(module), {name: tensor.clone() for name, tensor in module.state_dict().items()}
    handle = inject(module, tmp_path)
    assert torch.allclose(output(module), wanted, atol=1e-5)
    assert (wanted - before).abs().max() > 1e-2, "the adapter changes nothing"
    handle.reset()
    handle.reset()
    assert all(torch.equal(tensor, own[name]) for name, tensor in module.state_dict().items())


@each_case
def test_peft_loads_what_is_written_as_one_of_two_adapters_and_merged(case: str, tmp_path: Path) -> None:
    wanted = peft_folder(case, tmp_path / "theirs")
    adapter = read_adapter(tmp_path / "theirs")
    write_adapter(adapter, tmp_path / "ours")
    module = built(case)
    before = output(module)
    model = peft.PeftModel.from_pretrained(module, tmp_path / "ours").eval()
    assert torch.allclose(output(model), wanted, atol=1e-5)
    assert (wanted - before).abs().max() > 1e-2
    if not adapter.whole:
        doubled = LoRAAdapter(factors=adapter.factors, scales={name: 2 * one for name, one in adapter.scales.items()})
        model.load_adapter(write_adapter(doubled, tmp_path / "second"), adapter_name="second")
        model.set_adapter("second")
        with inject(built(case), doubled) as other:
            assert torch.allclose(output(model), output(other), atol=1e-5)
        model.set_adapter("default")
    assert torch.allclose(output(model.merge_and_unload()), wanted, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"rank_pattern": {"query": 4}, "alpha_pattern": {r"layer\.1\.attention\.self\.value": 3}},
    ],
    ids=["rslora", "patterns"],
)
def test_other_scales_and_ranks_are_read_and_written(settings: dict[str, Any], tmp_path: Path) -> None:
    wanted = peft_folder("encoder", tmp_path / "theirs", **settings)
    with inject(built("encoder"), tmp_path / "theirs") as module:
        assert torch.allclose(output(module), wanted, atol=1e-5)
    write_adapter(read_adapter(tmp_path / "theirs"), tmp_path / "ours")
    model = peft.PeftModel.from_pretrained(built("encoder"), tmp_path / "ours")
    assert torch.allclose(output(model.eval()), wanted, atol=1e-5)


@pytest.mark.parametrize("alpha", [None, 0])
def test_a_config_without_a_scale_or_with_none_is_read_as_peft_reads_it(alpha: int | None, tmp_path: Path) -> None:
    peft_folder("encoder", tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    config.pop("lora_alpha")
    (tmp_path / CONFIG).write_text(json.dumps(config if alpha is None else config | {"lora_alpha": alpha}))
    wanted = output(peft.PeftModel.from_pretrained(built("encoder"), tmp_path).eval())
    with inject(built("encoder"), tmp_path) as module:
        assert torch.allclose(output(module), wanted, atol=1e-5)


def test_half_precision_is_kept(tmp_path: Path) -> None:
    peft_folder("encoder", tmp_path)
    module = built("encoder").to(torch.bfloat16)
    own = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with inject(module, tmp_path):
        changed = module.state_dict()
        assert all(tensor.dtype == torch.bfloat16 for tensor in changed.values())
        assert any(not torch.equal(tensor, own[name]) for name, tensor in changed.items())
    assert all(torch.equal(tensor, own[name]) for name, tensor in module.state_dict().items())


def test_tensors_that_are_brought_whole_are_exact() -> None:
    linear = nn.Linear(4, 3)
    nn.init.constant_(linear.bias, 1e4)
    module = nn.Sequential(linear, nn.BatchNorm1d(3))
    bias, count = torch.tensor([0.1, torch.inf, -torch.inf]), torch.tensor(2**40 + 1)
    whole = {"0.bias": bias, "1.num_batches_tracked": count}
    factors = {"0": (torch.ones(1, 4), torch.ones(3, 1))}
    with inject(module, LoRAAdapter(factors=factors, scales={"0": 1.0}, whole=whole)) as adapted:
        own = adapted.state_dict()
        assert torch.equal(own["0.bias"], bias)
        assert torch.equal(own["1.num_batches_tracked"], count)


def test_peft_gives_a_module_of_the_same_ending_factors_that_change_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))), torch.randn(2, 4)
    adapter = LoRAAdapter(factors={"0": (torch.ones(1, 4), torch.ones(4, 1))}, scales={"0": 1.0})
    with inject(module, adapter), torch.no_grad():
        wanted = module(x)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        model = peft.PeftModel.from_pretrained(module, write_adapter(adapter, tmp_path))
    assert hasattr(module.get_submodule("1.0"), "lora_A")
    with torch.no_grad():
        assert torch.allclose(model.base_model(x), wanted)


def test_an_adapter_without_factors_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="the adapter has no factors"):
        write_adapter(LoRAAdapter(factors={}, scales={}), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "is IA3; plain LoRA is read alone"),
        ({"peft_type": "PROMPT_TUNING"}, "is PROMPT_TUNING; plain"),
        ({"use_dora": True}, "is LORA with use_dora; plain"),
        ({"bias": "all"}, "adapts biases too"),
        ({"alpha_pattern": {"(a+)+b": 3}}, "is no name of a module; write out the names"),
        ({"lora_alpha": "many"}, "lora_alpha=many, .* are no numbers"),
        ({"alpha_pattern": ["query"]}, "are no numbers"),
    ],
)
def test_adapters_of_other_kinds_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    peft_folder("encoder", tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text()) | changes
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=message):
        read_adapter(tmp_path)


def test_damaged_folders_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"holds no adapter_config\.json; give the folder of a PEFT adapter"):
        read_adapter(tmp_path)
    peft_folder("encoder", tmp_path)
    tensors = load_state_dict(tmp_path / TENSORS)
    first = next(iter(tensors))
    # PEFT loads such a file without an error, and nothing changes.
    save_state_dict({first.removeprefix("base_model.model."): tensors[first]}, tmp_path / TENSORS, {})
    with pytest.raises(AdapterError, match="PEFT finds no tensor by the name"):
        read_adapter(tmp_path)
    save_state_dict({first: tensors[first]}, tmp_path / TENSORS, {})
    with pytest.raises(AdapterError, match="has no two matrices of one rank"):
        read_adapter(tmp_path)
    save_state_dict({"base_model.model.classifier.weight": torch.ones(3, 16)}, tmp_path / TENSORS, {})
    with pytest.raises(AdapterError, match="holds no factors of LoRA"):
        read_adapter(tmp_path)
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(AdapterError, match="cannot be read"):
        read_adapter(tmp_path)


def test_an_adapter_of_another_base_changes_nothing(tmp_path: Path) -> None:
    peft_folder("encoder", tmp_path)
    other = llama()
    own = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(AdapterError, match=r"LlamaForCausalLM has no matrix 'encoder.layer.0.*give its base model"):
        inject(other, tmp_path)
    wide = transformers.BertModel(transformers.BertConfig(**(SIZES | {"hidden_size": 32})))
    with pytest.raises(AdapterError, match="is one of another base model"):
        inject(wide, tmp_path)
    assert all(torch.equal(tensor, own[name]) for name, tensor in other.state_dict().items())
