from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from raywgen.tasks import TaskError, build_network
from raywgen.tasks.networks import Conv4
from tests.tasks.networks.measures import num_parameters, without_gradient


def test_value_counts() -> None:
    # 111,936 is the encoder of the prototypical networks on Omniglot.
    assert num_parameters({"name": "conv4"}) == 111_936
    assert num_parameters({"name": "conv4", "num_classes": 5}) == 111_936 + 65 * 5
    assert num_parameters({"name": "conv4", "in_channels": 3, "width": 32}) == 28_896


@pytest.mark.parametrize(("image_size", "width", "num_features"), [(28, 64, 64), (16, 8, 8), (84, 32, 800)])
def test_features_and_logits_have_their_shapes(image_size: int, width: int, num_features: int) -> None:
    images = torch.randn(3, 2, image_size, image_size)
    encoder = Conv4(2, width=width, image_size=image_size).eval()
    network = Conv4(2, 5, width, image_size).eval()
    assert encoder(images).shape == network.features(images).shape == (3, num_features)
    assert torch.equal(encoder(images), encoder.features(images))
    assert network(images).shape == (3, 5)
    assert torch.equal(network(images.flatten(1)), network(images))


@pytest.mark.parametrize("training", [True, False])
def test_features_are_four_blocks_written_out(training: bool) -> None:
    module = Conv4(width=6).double().train(training)
    x = images = torch.randn(9, 1, 28, 28, dtype=torch.float64)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for block in range(4):
        conv, norm = f"blocks.{block}.conv", f"blocks.{block}.bn"
        x = F.conv2d(x, state[f"{conv}.weight"], state[f"{conv}.bias"], padding=1)
        mean, variance = state[f"{norm}.running_mean"], state[f"{norm}.running_var"]
        if training:
            mean, variance = x.mean(dim=(0, 2, 3)), x.var(dim=(0, 2, 3), correction=0)
        x = (x - mean.view(-1, 1, 1)) / (variance.view(-1, 1, 1) + 1e-5).sqrt()
        x = x * state[f"{norm}.weight"].view(-1, 1, 1) + state[f"{norm}.bias"].view(-1, 1, 1)
        x = F.max_pool2d(x.clamp(min=0), 2)
    torch.testing.assert_close(module.features(images), x.flatten(1))


def test_state_dict_names() -> None:
    names = list(Conv4(num_classes=5).state_dict())
    assert len(names) == 4 * 7 + 2
    assert names[:4] == ["blocks.0.conv.weight", "blocks.0.conv.bias", "blocks.0.bn.weight", "blocks.0.bn.bias"]
    assert names[-2:] == ["head.weight", "head.bias"]


def test_gradients_reach_every_parameter() -> None:
    # Batch statistics would cancel the convolutions' biases, so running statistics are used.
    assert without_gradient(Conv4(num_classes=5).eval(), torch.randn(8, 1, 28, 28)) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 15}, "image_size=15: .*give at least 16"),
        ({"num_classes": 0}, "num_classes=0: give a whole number of at least 1"),
        ({"width": 0}, "width=0"),
        ({"depth": 4}, "does not take .*depth.*it takes in_channels, num_classes, width, image_size"),
    ],
)
def test_wrong_arguments_say_what_to_give(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        build_network({"name": "conv4", **arguments})
