from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from raywgen.tasks import TaskError, build_network
from raywgen.tasks.networks import VisionTransformer
from tests.tasks.networks.measures import num_parameters, without_gradient


@pytest.mark.parametrize(
    ("recipe", "count"),
    [
        ({"name": "vit-ti"}, 5_717_416),
        ({"name": "vit-s"}, 22_050_664),
        ({"name": "vit-b"}, 86_567_656),
        ({"name": "vit-l"}, 304_326_632),
        ({"name": "vit-ti", "num_classes": 10}, 5_717_416 - 990 * 193),
        ({"name": "vit-ti", "image_size": 32}, 5_717_416 - 192 * (14**2 - 2**2)),
    ],
)
def test_parameter_counts_are_timms(recipe: dict[str, object], count: int) -> None:
    assert num_parameters(recipe) == count


@pytest.mark.parametrize("name", ["vit-ti", "vit-s", "vit-b", "vit-l"])
def test_imagenet_images_give_1000_logits(name: str) -> None:
    with torch.device("meta"):
        assert build_network({"name": name})(torch.empty(2, 3, 224, 224)).shape == (2, 1000)


def test_state_dict_names_are_timms_in_its_order() -> None:
    blocks = [
        f"blocks.{block}.{layer}.{part}"
        for block in range(2)
        for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        for part in ("weight", "bias")
    ]
    first = ["cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]
    last = ["norm.weight", "norm.bias", "head.weight", "head.bias"]
    assert list(small().state_dict()) == [*first, *blocks, *last]


def test_the_equations_written_out() -> None:
    module = small().double()
    for parameter in module.parameters():
        parameter.data.normal_(std=0.3)
    images = torch.randn(3, 2, 8, 8, dtype=torch.float64)
    state = module.state_dict()

    def affine(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def normed(x: Tensor, name: str) -> Tensor:
        spread = (x.var(dim=-1, correction=0, keepdim=True) + 1e-6).sqrt()
        return (x - x.mean(dim=-1, keepdim=True)) / spread * state[f"{name}.weight"] + state[f"{name}.bias"]

    for image, logits in zip(images, module(images), strict=True):
        kernel = state["patch_embed.proj.weight"].flatten(1)
        corners = [(row, column) for row in (0, 4) for column in (0, 4)]
        patches = [kernel @ image[:, row : row + 4, column : column + 4].flatten() for row, column in corners]
        x = torch.stack([state["cls_token"][0, 0], *(p + state["patch_embed.proj.bias"] for p in patches)])
        x = x + state["pos_embed"][0]
        for at in ("blocks.0", "blocks.1"):
            query, key, value = affine(normed(x, f"{at}.norm1"), f"{at}.attn.qkv").chunk(3, dim=-1)
            heads = []
            for head in (slice(0, 4), slice(4, 8), slice(8, 12)):
                weights = (query[:, head] @ key[:, head].T / math.sqrt(4)).exp()
                heads.append(weights / weights.sum(dim=1, keepdim=True) @ value[:, head])
            x = x + affine(torch.cat(heads, dim=1), f"{at}.attn.proj")
            hidden = affine(normed(x, f"{at}.norm2"), f"{at}.mlp.fc1")
            x = x + affine(hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2, f"{at}.mlp.fc2")
        torch.testing.assert_close(logits, affine(normed(x, "norm")[0], "head"))


def test_images_and_their_rows_give_logits() -> None:
    module = build_network({"name": "vit-ti", "num_classes": 7, "image_size": 32, "in_channels": 1})
    images = torch.randn(3, 1, 32, 32)
    assert module(images).shape == (3, 7)
    assert torch.equal(module(images.flatten(1)), module(images))


def test_gradients_reach_every_parameter() -> None:
    assert without_gradient(small(), torch.randn(4, 2, 8, 8)) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 30}, "image_size=30: give a multiple of patch_size=16"),
        ({"num_classes": 0}, "num_classes=0: give a whole number of at least 1"),
        ({"patch_size": 0}, "patch_size=0: give a whole number of at least 1"),
        ({"width": 3}, "does not take .*width.*it takes num_classes, image_size, patch_size, in_channels"),
    ],
)
def test_wrong_arguments_say_what_to_give(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        build_network({"name": "vit-ti", **arguments})


def test_a_width_that_the_heads_do_not_share_is_refused() -> None:
    with pytest.raises(TaskError, match="width=10: give a multiple of num_heads=3"):
        VisionTransformer(10, 1, 3)


def small() -> VisionTransformer:
    return VisionTransformer(12, 2, 3, num_classes=5, image_size=8, patch_size=4, in_channels=2)
