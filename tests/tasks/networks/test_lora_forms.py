"""Adapters of which B alone, or a core between frozen factors, is trained."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raywgen.tasks import TaskError, build_network
from raywgen.tasks.networks import LoRANetwork
from raywgen.tasks.networks.lora import merge
from raywgen.tasks.networks.text_adapter import TextAdapters, text_adapter
from raywgen.weights.adapters import read_adapter, write_adapter
from tests.second_device import DEVICE, SecondDevice, SecondDeviceTensor
from tests.text_encoders import make_encoder

SHAPES = {"factors": {"lora_A": (2, 12), "lora_B": (8, 2)}, "b": {"lora_B": (8, 2)}, "core": {"lora_core": (2, 2)}}


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))


def filled(form: Any) -> LoRANetwork:
    network = LoRANetwork(base(), rank=2, targets=["0"], alpha=6, form=form)
    torch.manual_seed(1)
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    return network


@pytest.mark.parametrize("form", SHAPES)
def test_each_form_trains_its_own_tensors_and_starts_as_the_base(form: Any) -> None:
    network = LoRANetwork(base(), rank=2, targets=["0"], form=form)
    state = network.state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        f"0.{suffix}": shape for suffix, shape in SHAPES[form].items()
    }
    x = torch.randn(5, 12)
    assert torch.equal(network(x), base()(x))
    network(x).square().sum().backward()
    moved = [name for name, parameter in network.named_parameters() if parameter.grad is not None]
    assert moved == list(state)
    assert any(bool(parameter.grad.abs().sum() > 0) for parameter in network.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("form", SHAPES)
def test_its_factors_are_what_is_added(form: Any) -> None:
    network, x = filled(form), torch.randn(5, 12)
    ((name, (a_RI, b_OR)),) = network.factors().items()
    assert name == "0"
    own = base()
    changed = own.get_submodule("0")
    assert isinstance(changed, nn.Linear)
    with torch.no_grad():
        changed.weight += 3 * b_OR @ a_RI
        assert torch.allclose(own(x), network(x), atol=1e-6)
        own.load_state_dict(merge(network))
        assert torch.allclose(own(x), network(x), atol=1e-6)


@pytest.mark.parametrize("form", SHAPES)
def test_frozen_factors_follow_the_network(form: Any) -> None:
    network, x = filled(form), torch.randn(5, 12)
    wanted = network(x)
    exact = copy.deepcopy(network).double()
    torch.testing.assert_close(exact(x.double()).float(), wanted)
    assert {part.dtype for pair in exact.factors().values() for part in pair} == {torch.float64}
    with SecondDevice():
        moved = copy.deepcopy(network).to(DEVICE)
        fixed = [part for parts in moved._fixed.values() for part in parts]
        assert all(isinstance(part, SecondDeviceTensor) for part in fixed)
        torch.testing.assert_close(moved(x.to(DEVICE)).cpu(), wanted)


def test_frozen_factors_are_singular_vectors() -> None:
    weight_OI = base().state_dict()["0.weight"]
    left_OK, _, right_KI = torch.linalg.svd(weight_OI, full_matrices=False)
    core = filled("core")
    a_RI, b_OR = core.factors()["0"]
    assert torch.allclose((a_RI @ right_KI[:2].T).abs(), torch.eye(2), atol=1e-5)
    core_RR = core.state_dict()["0.lora_core"]
    outer_OR = b_OR.detach() @ torch.linalg.inv(core_RR)
    assert torch.allclose((outer_OR.T @ left_OK[:, :2]).abs(), torch.eye(2), atol=1e-4)
    # The pair keeps the sign that it has in the weight.
    assert torch.allclose(outer_OR.T @ weight_OI @ a_RI.T, torch.linalg.svdvals(weight_OI)[:2].diag(), atol=1e-4)
    assert torch.equal(filled("b").factors()["0"][0], a_RI)


@pytest.mark.parametrize("form", ["b", "core"])
def test_folders_hold_both_factors(form: str, tmp_path: Path) -> None:
    upper = {"name": "upper-layers", "path": make_encoder(tmp_path / "encoder"), "first_layer": 1, "num_classes": 2}
    recipe: dict[str, Any] = {"name": "lora", "base": upper, "rank": 2, "targets": ["query"], "form": form}
    network = build_network(recipe)
    assert isinstance(network, LoRANetwork)
    torch.manual_seed(1)
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    read = read_adapter(write_adapter(text_adapter(recipe, network.state_dict())[0], tmp_path / "adapter"))
    assert read.factors.keys() == network.factors().keys()
    for name, (a_RI, b_OR) in network.factors().items():
        assert torch.allclose(read.change(name), b_OR @ a_RI, atol=1e-6)
    assert not read.whole


@pytest.mark.parametrize("form", ["b", "core"])
def test_folders_of_one_recipe_need_one_network(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upper = {"name": "upper-layers", "path": make_encoder(tmp_path / "encoder"), "first_layer": 1, "num_classes": 0}
    recipe: dict[str, Any] = {"name": "lora", "base": upper, "rank": 2, "targets": ["query"], "form": form}
    network, built = build_network(recipe), []
    assert isinstance(network, LoRANetwork)

    def counted(recipe: dict[str, Any]) -> nn.Module:
        built.append(recipe)
        return build_network(recipe)

    monkeypatch.setattr("raywgen.tasks.networks.text_adapter.build_network", counted)
    adapters, wanted, found = TextAdapters(recipe), [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        for parameter in network.parameters():
            nn.init.normal_(parameter)
        wanted.append({name: (b_OR @ a_RI).detach() for name, (a_RI, b_OR) in network.factors().items()})
        state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        found.append(adapters.split(state)[0].factors)
    assert len(built) == 1
    for products, factors in zip(wanted, found, strict=True):
        assert products.keys() == factors.keys()
        assert all(torch.equal(factors[name][1] @ factors[name][0], product) for name, product in products.items())


def test_an_unknown_form_is_named() -> None:
    wrong: Any = "svd"
    with pytest.raises(TaskError, match="form=svd: give one of factors, b, core"):
        LoRANetwork(base(), rank=2, targets=["0"], form=wrong)
