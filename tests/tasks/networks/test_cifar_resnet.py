from __future__ import annotations

import io
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from raywgen.tasks import TaskError, build_network
from raywgen.tasks.networks import CifarResNet
from raywgen.tasks.networks.cifar_resnet import DEPTHS, option_a_shortcut
from tests.tasks.networks.measures import num_parameters, without_gradient

DATA = Path(__file__).parents[3] / "../shared/data"
IMAGES = DATA / "cifar10-test.parquet"
PRETRAINED = [(depth, DATA / f"pretrained/cifar10-resnet{depth}.safetensors") for depth in (20, 32, 44)]
needs_data = pytest.mark.skipif(
    not (IMAGES.is_file() and all(path.is_file() for _, path in PRETRAINED)),
    reason="../shared/data holds the real pretrained networks and CIFAR-10, and is not here",
)


@pytest.mark.parametrize(
    ("depth", "count"), [(8, 75_290), (20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018), (110, 1_727_962)]
)
def test_value_counts_are_the_published_ones(depth: int, count: int) -> None:
    assert num_parameters({"name": "cifar-resnet", "depth": depth}) == count


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_depth_counts_the_layers_with_weights(depth: int) -> None:
    with torch.device("meta"):
        module = CifarResNet(depth)
    assert sum(isinstance(part, torch.nn.Conv2d | torch.nn.Linear) for part in module.modules()) == depth


@pytest.mark.parametrize(("width", "stride"), [(4, 1), (4, 2), (8, 2), (7, 2), (9, 1), (8, 3)])
@pytest.mark.parametrize("size", [(6, 6), (5, 7)])
def test_option_a_is_a_strided_copy_among_zeros(width: int, stride: int, size: tuple[int, int]) -> None:
    x = torch.randn(3, 4, *size, dtype=torch.float64)
    expected = torch.zeros(3, width, -(-size[0] // stride), -(-size[1] // stride), dtype=torch.float64)
    before = (width - 4) // 2
    for channel in range(4):
        for row in range(expected.shape[2]):
            for column in range(expected.shape[3]):
                value = x[:, channel, row * stride, column * stride]
                expected[:, before + channel, row, column] = value
    assert torch.equal(option_a_shortcut(x, width, stride), expected)


def test_an_unchanged_shape_is_handed_through() -> None:
    x = torch.randn(2, 4, 3, 3)
    assert option_a_shortcut(x, 4, 1) is x


@pytest.mark.parametrize("widths", [(4, 8, 16), (4, 4, 4), (3, 8, 9)])
def test_images_and_their_rows_give_logits(widths: tuple[int, ...]) -> None:
    module = CifarResNet(8, widths, num_classes=7, in_channels=2).eval()
    images = torch.randn(3, 2, 16, 16)
    assert module(images).shape == (3, 7)
    assert torch.equal(module(images.flatten(1)), module(images))
    assert module.layer3(module.layer2(torch.randn(3, widths[0], 16, 16))).shape == (3, widths[2], 4, 4)


def test_gradients_reach_every_parameter() -> None:
    assert without_gradient(CifarResNet(14, (4, 8, 16)), torch.randn(8, 3, 32, 32)) == []


@needs_data
@pytest.mark.parametrize(("depth", "path"), PRETRAINED)
def test_real_pretrained_networks_load_and_classify(depth: int, path: Path) -> None:
    state = load_file(path)
    module = build_network({"name": "cifar-resnet", "depth": depth}).eval()
    own = {name for name in module.state_dict() if not name.endswith("num_batches_tracked")}
    assert own == {name for name in state if not name.endswith("num_batches_tracked")}
    module.load_state_dict(state, strict=True)
    images, labels = cifar_test_images(500)
    with torch.inference_mode():
        accuracy = (module(images).argmax(dim=1) == labels).double().mean().item()
    assert accuracy > 0.75


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 21}, r"depth=21: give 6n \+ 2 from 8 to 110, for instance 20"),
        ({"depth": 2}, "depth=2: .*for instance 8"),
        ({"depth": 116}, "depth=116: .*for instance 110"),
        ({"depth": 8, "widths": [16, 32]}, "give three widths that do not shrink"),
        ({"depth": 8, "widths": [16, 8, 64]}, "give three widths that do not shrink"),
        ({"depth": 8, "widths": [0, 8, 64]}, "give three widths that do not shrink"),
        ({"depth": 8, "num_classes": 0}, "num_classes=0: give a whole number of at least 1"),
        ({}, "missing 1 required positional argument: 'depth'; it takes depth, widths, num_classes, in_channels"),
        ({"depth": 8, "width": 16}, "does not take .*width.*it takes depth, widths, num_classes, in_channels"),
    ],
)
def test_wrong_arguments_say_what_to_give(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        build_network({"name": "cifar-resnet", **arguments})


@cache
def cifar_test_images(count: int) -> tuple[Tensor, Tensor]:
    """The first images `(S, 3, 32, 32)`, normalised as the pretrained networks take them, and their labels."""
    table = next(pq.ParquetFile(IMAGES).iter_batches(count, columns=["image", "label"]))
    rows = [np.asarray(Image.open(io.BytesIO(image["bytes"]))) for image in table["image"].to_pylist()]
    images = torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).float() / 255
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    labels = torch.tensor(table["label"].to_pylist())
    return (images - mean.view(3, 1, 1)) / deviation.view(3, 1, 1), labels
