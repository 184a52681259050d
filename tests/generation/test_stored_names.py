from __future__ import annotations

import copy

import pytest
import torch

from raywgen.generation.best import candidate_logits
from raywgen.generation.stored_names import ByStoredNames, by_stored_names
from raywgen.tasks.runnable import runnable
from raywgen.weights import Layout

transformers = pytest.importorskip("transformers")


def vit() -> torch.nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=3)
    return transformers.ViTForImageClassification(config).eval()


def test_the_names_are_those_that_the_library_saves(tmp_path: object) -> None:
    from safetensors.torch import load_file

    module = vit()
    module.save_pretrained(str(tmp_path))  # pyright: ignore[reportCallIssue]
    assert set(by_stored_names(module).state_dict()) == set(load_file(f"{tmp_path}/model.safetensors"))


def test_it_computes_what_the_module_computes_and_writes_into_it() -> None:
    module = vit()
    renamed, x = by_stored_names(module), torch.rand(2, 3, 16, 16)
    if not isinstance(renamed, ByStoredNames):
        pytest.skip("this version of transformers names tensors as its files do")
    before = module(x).logits
    assert torch.equal(renamed(x).logits, before)
    other = {name: tensor + 0.1 for name, tensor in renamed.state_dict().items()}
    copied = copy.deepcopy(renamed)
    copied.load_state_dict(other, strict=True)
    assert torch.equal(module(x).logits, before), "a copy has tensors of its own"
    called = torch.func.functional_call(renamed, other, (x,)).logits
    renamed.load_state_dict(other, strict=True)
    assert torch.equal(module(x).logits, called)
    assert torch.equal(copied(x).logits, called)
    assert not torch.equal(called, before)
    renamed.train()
    assert module.training


def test_candidates_of_it_are_run_beside_each_other() -> None:
    module, x = vit(), torch.rand(2, 3, 16, 16)
    renamed = by_stored_names(module)
    layout = Layout.from_state_dict(renamed.state_dict())
    runs, samples_SF = runnable(renamed, [x], 3)
    values_ND = torch.stack([layout.flatten(renamed.state_dict()), layout.flatten(renamed.state_dict()) + 0.1])
    logits_NSC = candidate_logits(runs, layout, values_ND, samples_SF.expand(2, -1, -1))
    torch.testing.assert_close(logits_NSC[0], module(x).logits)
    assert not torch.allclose(logits_NSC[1], logits_NSC[0])


def test_any_other_module_stays_as_it_is() -> None:
    module = torch.nn.Linear(2, 2)
    assert by_stored_names(module) is module
