from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from raywgen.tasks import TaskError, build_network, network_name, stacked_logits
from raywgen.tasks.networks import NETWORKS
from raywgen.trust import trusting


@pytest.fixture(autouse=True)
def _own_word() -> Iterator[None]:
    with trusting("torch", "pathlib", "no.such", "tests"):
        yield


def test_an_mlp_has_the_asked_widths_and_ends_in_logits() -> None:
    module = build_network({"name": "mlp", "widths": [64, 12, 8, 2]})
    shapes = [tuple(tensor.shape) for tensor in module.state_dict().values()]
    assert shapes == [(12, 64), (12,), (8, 12), (8,), (2, 8), (2,)]
    assert [type(part) for part in module.children()] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]


@pytest.mark.parametrize("bias", [True, False])
def test_a_plain_cnn_halves_the_image_in_each_layer(bias: bool) -> None:
    module = build_network({"name": "cnn", "channels": [3, 5], "num_classes": 4, "bias": bias})
    weights = [tuple(tensor.shape) for name, tensor in module.state_dict().items() if name.endswith("weight")]
    assert weights == [(3, 1, 3, 3), (5, 3, 3, 3), (4, 5 * 2 * 2)]
    assert any(name.endswith("bias") for name in module.state_dict()) == bias
    x_SF = torch.randn(7, 64)
    assert torch.equal(module(x_SF), module(x_SF.view(7, 1, 8, 8)))


def test_layers_without_biases() -> None:
    module = build_network({"name": "mlp", "widths": [4, 3, 2], "bias": False})
    assert [tuple(tensor.shape) for tensor in module.state_dict().values()] == [(3, 4), (2, 3)]


def test_a_start_is_fixed_by_the_seed() -> None:
    recipe = {"name": "mlp", "widths": [64, 14, 2]}
    torch.manual_seed(3)
    first = build_network(recipe).state_dict()
    torch.manual_seed(3)
    again = build_network(recipe).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_network_by_import_path() -> None:
    module = build_network({"name": "torch.nn:Linear", "in_features": 3, "out_features": 2})
    assert isinstance(module, nn.Linear)
    assert module.weight.shape == (2, 3)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"name": "mpl", "widths": [2, 2]}, "unknown network 'mpl'; did you mean 'mlp'"),
        ({}, "unknown network ''"),
        ({"name": "mlp", "width": [2, 2]}, "does not take"),
        ({"name": "mlp", "widths": [2]}, "at least two positive widths"),
        ({"name": "cnn", "channels": [4] * 4}, "no more layers than the image can be halved"),
        ({"name": "cnn", "channels": []}, "at least one layer"),
        ({"name": "torch.nn:NoSuchLayer"}, "cannot import network 'torch.nn:NoSuchLayer'"),
        ({"name": "no.such.package:Net"}, "cannot import network 'no.such.package:Net'"),
        ({"name": "pathlib:Path"}, "is no subclass of torch.nn.Module"),
    ],
)
def test_recipes_that_build_nothing_say_why(recipe: dict[str, object], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        build_network(recipe)


def test_the_registry_names_every_network() -> None:
    vits, resnets = ["vit-ti", "vit-s", "vit-b", "vit-l"], ["cifar-resnet", "resnet50", "resnet101"]
    text = ["lora", "upper-layers", "causal-lm", "next-word"]
    assert list(NETWORKS) == ["mlp", "cnn", "tiny-cnn", "tiny-cnn-rgb", "conv4", *resnets, *vits, "head", *text]


@pytest.mark.parametrize(
    ("recipe", "num_features"),
    [
        ({"name": "tiny-cnn"}, 784),
        ({"name": "tiny-cnn-rgb"}, 3072),
        ({"name": "conv4", "num_classes": 5, "width": 8}, 784),
        ({"name": "cifar-resnet", "depth": 8, "widths": [4, 8, 16]}, 3072),
        ({"name": "vit-ti", "num_classes": 5, "image_size": 32}, 3072),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_stacks_of_networks_run_at_once_on_rows(recipe: dict[str, object], num_features: int, training: bool) -> None:
    modules = [build_network(recipe).train(training) for _ in range(2)]
    x_SF = torch.randn(6, num_features)
    states = [module.state_dict() for module in modules]
    stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    together = stacked_logits(modules[0], stacked, x_SF)
    torch.testing.assert_close(together, torch.stack([module(x_SF) for module in modules]), rtol=1e-3, atol=1e-4)


def test_names_say_the_architecture() -> None:
    assert network_name({"name": "mlp", "widths": [64, 14, 2]}) == "mlp-64-14-2"
    assert network_name({"name": "torch.nn:Linear", "in_features": 3, "out_features": 2}) == "Linear-3-2"


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        ({"name": "tiny-cnn"}, "tiny-cnn"),
        ({"name": "tiny-cnn", "activation": "gelu"}, "tiny-cnn-gelu"),
        ({"name": "conv4", "in_channels": 3}, "conv4-3"),
        ({"name": "conv4", "num_classes": 3}, "conv4-num_classes_3"),
        ({"name": "cifar-resnet", "depth": 20}, "cifar-resnet-20"),
        ({"name": "cifar-resnet", "widths": [8, 16, 32], "depth": 20}, "cifar-resnet-20-8-16-32"),
        ({"name": "cifar-resnet", "depth": 20, "num_classes": 100}, "cifar-resnet-20-num_classes_100"),
        (
            {"name": "cifar-resnet", "depth": 20, "widths": [8, 16, 32], "num_classes": 9},
            "cifar-resnet-20-8-16-32-num_classes_9",
        ),
        ({"name": "vit-s", "num_classes": 10, "image_size": 32}, "vit-s-10-32"),
        ({"name": "torch.nn:Linear", "out_features": 3, "in_features": 2}, "Linear-2-3"),
        ({"name": "torch.nn:Linear", "in_features": 3, "out_features": 2, "dtype": "x"}, "Linear-3-2-dtype_x"),
    ],
)
def test_names_are_short_and_tell_recipes_apart(recipe: dict[str, object], name: str) -> None:
    assert network_name(recipe) == name
    backwards = dict(reversed(list(recipe.items())))
    assert network_name(backwards) == name


def test_an_unknown_network_has_no_name() -> None:
    with pytest.raises(TaskError, match="unknown network 'mpl'"):
        network_name({"name": "mpl"})


class OwnNet(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3)

    def forward(self, x_SCHW: torch.Tensor) -> torch.Tensor:
        return self.conv(x_SCHW).mean(dim=(2, 3))


def test_a_module_of_ones_own_gets_images_of_the_shape_it_asks_for() -> None:
    recipe = {"name": "tests.tasks.networks.test_registry:OwnNet", "width": 4, "input_shape": [1, 8, 8]}
    module = build_network(recipe)
    assert network_name(recipe) == "OwnNet-4"
    x_SF = torch.rand(6, 64)
    logits_SC = module(x_SF)
    assert torch.equal(logits_SC, module(x_SF.view(6, 1, 8, 8)))
    stacked = {name: torch.stack([tensor, 2 * tensor]) for name, tensor in module.state_dict().items()}
    torch.testing.assert_close(stacked_logits(module, stacked, x_SF)[0], logits_SC)
    assert set(copy.deepcopy(module).state_dict()) == {"conv.weight", "conv.bias"}
