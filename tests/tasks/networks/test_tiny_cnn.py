from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from raywgen.tasks import TaskError, build_network
from raywgen.tasks.networks import TinyCnn, tiny_cnn, tiny_cnn_rgb
from raywgen.tasks.networks.tiny_cnn import ACTIVATIONS
from tests.tasks.networks.measures import num_parameters, without_gradient

FUNCTIONS = {"tanh": torch.tanh, "gelu": F.gelu, "relu": torch.relu}


@pytest.mark.parametrize(
    ("recipe", "count"),
    [
        ({"name": "tiny-cnn"}, 2_464),
        ({"name": "tiny-cnn", "in_channels": 3}, 2_864),
        ({"name": "tiny-cnn", "num_classes": 4}, 2_464 - 6 * 21),
        ({"name": "tiny-cnn-rgb"}, 10_853),
        ({"name": "tiny-cnn-rgb", "in_channels": 1}, 10_853 - 2 * 9 * 16),
    ],
)
def test_value_counts_are_those_of_the_model_zoos(recipe: dict[str, object], count: int) -> None:
    assert num_parameters(recipe) == count


def test_state_dict_names_are_those_of_the_published_zoos() -> None:
    small, large = tiny_cnn().state_dict(), tiny_cnn_rgb().state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in small.items() if name.endswith("weight")} == {
        "module_list.0.weight": (8, 1, 5, 5),
        "module_list.3.weight": (6, 8, 5, 5),
        "module_list.6.weight": (4, 6, 2, 2),
        "module_list.9.weight": (20, 36),
        "module_list.11.weight": (10, 20),
    }
    assert {name: tuple(tensor.shape) for name, tensor in large.items() if name.endswith("weight")} == {
        "module_list.0.weight": (16, 3, 3, 3),
        "module_list.4.weight": (32, 16, 3, 3),
        "module_list.8.weight": (15, 32, 3, 3),
        "module_list.13.weight": (20, 60),
        "module_list.16.weight": (10, 20),
    }


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("build", "shape"), [(tiny_cnn, (5, 1, 28, 28)), (tiny_cnn_rgb, (5, 3, 32, 32))])
def test_layers_convolve_then_pool_then_activate(
    build: Callable[..., TinyCnn], shape: tuple[int, ...], activation: str
) -> None:
    module = build(activation).double()
    images = torch.randn(shape, dtype=torch.float64)
    weights = [tensor for tensor in module.state_dict().values() if tensor.dim() > 1]
    biases = [tensor for tensor in module.state_dict().values() if tensor.dim() == 1]
    act, x = FUNCTIONS[activation], images
    for layer, (weight, bias) in enumerate(zip(weights[:3], biases[:3], strict=True)):
        x = F.conv2d(x, weight, bias)
        x = act(F.max_pool2d(x, 2) if layer < 2 or build is tiny_cnn_rgb else x)
    logits = F.linear(act(F.linear(x.flatten(1), weights[3], biases[3])), weights[4], biases[4])
    torch.testing.assert_close(module(images), logits)
    assert torch.equal(module(images.flatten(1)), module(images))


def test_gradients_reach_every_parameter() -> None:
    assert without_gradient(tiny_cnn(), torch.randn(8, 1, 28, 28)) == []
    assert without_gradient(tiny_cnn_rgb(), torch.randn(8, 3, 32, 32)) == []


def test_defaults_are_tanh_and_gelu() -> None:
    assert any(isinstance(part, torch.nn.Tanh) for part in tiny_cnn().modules())
    assert any(isinstance(part, torch.nn.GELU) for part in tiny_cnn_rgb().modules())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"activation": "swish"}, "unknown activation 'swish'; give one of tanh, gelu, relu"),
        ({"num_classes": 0}, "num_classes=0: give a whole number of at least 1"),
        ({"width": 3}, "does not take .*width.*it takes activation, num_classes, in_channels"),
    ],
)
@pytest.mark.parametrize("name", ["tiny-cnn", "tiny-cnn-rgb"])
def test_wrong_arguments_say_what_to_give(name: str, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        build_network({"name": name, **arguments})


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(TaskError, match=r"takes \(S, 1, 28, 28\), or the same flattened to \(S, 784\)"):
        tiny_cnn()(torch.zeros(2, 1, 32, 32))
