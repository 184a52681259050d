from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from raywgen.tasks import TaskError, build_network
from raywgen.tasks.networks import ResNet, resnet50, resnet101
from raywgen.tasks.networks.resnet import _Bottleneck
from tests.tasks.networks.measures import num_parameters, without_gradient

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@pytest.mark.parametrize(
    ("recipe", "count"),
    [
        ({"name": "resnet50"}, 25_557_032),
        ({"name": "resnet101"}, 44_549_160),
        ({"name": "resnet50", "num_classes": 10}, 25_557_032 - 990 * 2049),
        ({"name": "resnet50", "in_channels": 1}, 25_557_032 - 2 * 64 * 49),
    ],
)
def test_parameter_counts_are_torchvisions(recipe: dict[str, object], count: int) -> None:
    assert num_parameters(recipe) == count


@pytest.mark.parametrize(("build", "num_blocks"), [(resnet50, (3, 4, 6, 3)), (resnet101, (3, 4, 23, 3))])
def test_state_dict_names_are_torchvisions_in_its_order(
    build: Callable[..., ResNet], num_blocks: tuple[int, ...]
) -> None:
    expected = ["conv1.weight", *(f"bn1.{part}" for part in NORM)]
    for stage, count in enumerate(num_blocks, start=1):
        for block in range(count):
            at = f"layer{stage}.{block}"
            for layer in (1, 2, 3):
                expected += [f"{at}.conv{layer}.weight", *(f"{at}.bn{layer}.{part}" for part in NORM)]
            if block == 0:
                expected += [f"{at}.downsample.0.weight", *(f"{at}.downsample.1.{part}" for part in NORM)]
    with torch.device("meta"):
        state = build().state_dict()
    assert list(state) == [*expected, "fc.weight", "fc.bias"]
    assert state["layer2.0.conv1.weight"].shape == (128, 256, 1, 1)
    assert state["layer4.0.downsample.0.weight"].shape == (2048, 1024, 1, 1)


@pytest.mark.parametrize("build", [resnet50, resnet101])
def test_imagenet_images_give_1000_logits(build: Callable[..., ResNet]) -> None:
    with torch.device("meta"):
        module, images = build().eval(), torch.empty(2, 3, 224, 224)
        assert module(images).shape == (2, 1000)
        assert module.layer1(torch.empty(2, 64, 56, 56)).shape == (2, 256, 56, 56)
        assert module.layer2(torch.empty(2, 256, 56, 56)).shape == (2, 512, 28, 28)


@pytest.mark.parametrize(("width_in", "stride"), [(8, 1), (8, 2), (3, 1)])
def test_a_bottleneck_written_out(width_in: int, stride: int) -> None:
    block = _Bottleneck(width_in, 2, stride).double().eval()
    for tensor in block.state_dict().values():
        if tensor.dim() == 1:
            tensor.uniform_(0.5, 1.5)
    state = block.state_dict()
    x = torch.randn(2, width_in, 6, 6, dtype=torch.float64)
    out = _normed(_mixed(x, state["conv1.weight"]), state, "bn1").clamp(min=0)
    out = _normed(F.conv2d(out, state["conv2.weight"], stride=stride, padding=1), state, "bn2").clamp(min=0)
    out = _normed(_mixed(out, state["conv3.weight"]), state, "bn3")
    shortcut = x
    if (width_in, stride) != (8, 1):
        shortcut = _mixed(x[:, :, ::stride, ::stride], state["downsample.0.weight"])
        shortcut = _normed(shortcut, state, "downsample.1")
    torch.testing.assert_close(block(x), (out + shortcut).clamp(min=0))


def test_images_and_their_rows_give_logits() -> None:
    module = ResNet((1, 1, 1, 1), num_classes=7, in_channels=2).eval()
    images = torch.randn(2, 2, 32, 32)
    assert module(images).shape == (2, 7)
    assert torch.equal(module(images.flatten(1)), module(images))


def test_gradients_reach_every_parameter() -> None:
    assert without_gradient(ResNet((2, 1, 1, 1), num_classes=7), torch.randn(4, 3, 64, 64)) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, "num_classes=0: give a whole number of at least 1"),
        ({"depth": 50}, "does not take .*depth.*it takes num_classes, in_channels"),
    ],
)
@pytest.mark.parametrize("name", ["resnet50", "resnet101"])
def test_wrong_arguments_say_what_to_give(name: str, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        build_network({"name": name, **arguments})


def _mixed(x: Tensor, weight: Tensor) -> Tensor:
    """A 1x1 convolution."""
    return torch.einsum("oi, sihw -> sohw", weight[:, :, 0, 0], x)


def _normed(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    weight, bias, mean, variance = (state[f"{name}.{part}"].view(-1, 1, 1) for part in NORM[:4])
    return (x - mean) / (variance + 1e-5).sqrt() * weight + bias
