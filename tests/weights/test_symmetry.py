"""Reordering the units that `find_symmetry` names never changes a function, and it names all that may move."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raywgen.tasks.networks import ResNet, VisionTransformer, build_network
from raywgen.weights.symmetry import Symmetry, SymmetryError, check_symmetry, find_symmetry

FAMILIES: list[tuple[dict[str, Any], tuple[int, ...], list[int]]] = [
    ({"name": "mlp", "widths": [6, 5, 4, 2]}, (6,), [5, 4]),
    ({"name": "tiny-cnn"}, (784,), [8, 6, 4, 20]),
    ({"name": "tiny-cnn-rgb"}, (3072,), [16, 32, 15, 20]),
    ({"name": "conv4", "num_classes": 3, "width": 6}, (784,), [6] * 4),
    # Two poolings leave more than one pixel, so that the head's inputs are channels times pixels.
    ({"name": "conv4", "num_classes": 3, "width": 4, "image_size": 32}, (1024,), [4] * 4),
    # A stage's first channels are the last stage's, between zeros of the shortcut: 4, then 2 new, then 2 new.
    ({"name": "cifar-resnet", "depth": 14, "widths": [4, 6, 8]}, (3, 16, 16), [4, 4, 4, 6, 2, 6, 8, 2, 8]),
]


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every tensor away from its start: statistics, scales and shifts too."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var") or (tensor.dim() == 1 and name.endswith("weight")):
            tensor.uniform_(0.5, 2.0, generator=generator)
        elif tensor.is_floating_point():
            tensor.normal_(std=max(1, tensor[0].numel()) ** -0.5 if tensor.dim() > 1 else 0.5, generator=generator)
    return module.eval()


def sizes(symmetry: Symmetry) -> list[int]:
    return [group.num_units for group in symmetry.groups]


def moved(symmetry: Symmetry, seed: int = 3) -> list[Tensor]:
    """Random orders, none of them the identity."""
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(group.num_units, generator=generator) for group in symmetry.groups]
    return [order if (order != torch.arange(len(order))).any() else order.flip(0) for order in orders]


def change(module: nn.Module, symmetry: Symmetry, x: Tensor) -> tuple[float, bool]:
    """Relative change of the outputs after a reordering, and whether every group's tensors moved."""
    with torch.no_grad():
        before = module(x)
        state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        permuted = symmetry.permute(state, moved(symmetry))
        has_moved = all(
            any(not torch.equal(permuted[place.tensor], state[place.tensor]) for place in group.places)
            for group in symmetry.groups
        )
        module.load_state_dict(permuted)
        after = module(x)
        module.load_state_dict(state)
    return float((before - after).abs().max() / before.abs().max()), has_moved


@pytest.mark.parametrize(("recipe", "shape", "expected"), FAMILIES, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_family_computes_the_same_in_another_order(
    recipe: dict[str, Any], shape: tuple[int, ...], expected: list[int], dtype: torch.dtype
) -> None:
    module = randomised(build_network(recipe)).to(dtype)
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    symmetry = find_symmetry(module, x[:1])
    assert sorted(sizes(symmetry)) == sorted(expected)
    assert symmetry.blocked_by == ()
    difference, has_moved = change(module, symmetry, x)
    assert has_moved
    # Sums in another order: rounding alone, a hundred operations deep.
    assert difference < (1e-5 if dtype == torch.float32 else 1e-12)


def test_every_hidden_unit_of_a_bottleneck_resnet_may_move() -> None:
    module = randomised(ResNet((2, 1, 1, 1), num_classes=3))
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    symmetry = find_symmetry(module, x)
    inner = [width for width, num in [(64, 2), (128, 1), (256, 1), (512, 1)] for _ in range(2 * num)]
    assert sorted(sizes(symmetry)) == sorted([64, *inner, 256, 512, 1024, 2048])
    difference, has_moved = change(module, symmetry, x)
    assert has_moved
    assert difference < 1e-5


def test_a_transformer_moves_its_stream_and_its_perceptrons_but_no_heads() -> None:
    module = randomised(VisionTransformer(8, 2, 2, num_classes=3, image_size=8, patch_size=4))
    x = torch.randn(2, 3, 8, 8)
    symmetry = find_symmetry(module, x)
    assert sizes(symmetry) == [8, 32, 32]
    places = {(place.tensor, place.axis) for group in symmetry.groups for place in group.places}
    assert ("cls_token", 2) in places
    assert ("blocks.0.attn.qkv.weight", 1) in places
    assert ("blocks.0.attn.qkv.weight", 0) not in places
    assert change(module, symmetry, x)[0] < 1e-5


class Net(nn.Module):
    """A user's module: layers by name, and what `forward` does with them."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def lin(size_in: int, size_out: int) -> nn.Module:
    return nn.Linear(size_in, size_out)


def _gated(net: Any, x: Tensor) -> Tensor:
    value, gate = net.a(x).chunk(2, dim=-1)
    return net.b(value * gate.sigmoid())


def _dense(net: Any, x: Tensor) -> Tensor:
    first = net.a(x).relu()
    both = torch.cat([first, net.b(first).relu()], dim=1)
    return net.c(net.norm(both))


def _halves(net: Any, x: Tensor) -> Tensor:
    hidden = net.a(x)
    return net.b(torch.cat([hidden[:, :3].relu(), hidden[:, 3:].tanh()], dim=1))


def _ring(net: Any, x: Tensor) -> Tensor:
    hidden = net.a(x)
    return net.b(hidden + torch.cat([hidden[:, 1:], hidden[:, :1]], dim=1).tanh())


def _twice(net: Any, x: Tensor) -> Tensor:
    hidden = net.a(x).relu()
    return net.b(torch.cat([hidden, hidden], dim=1))


def _sorted(net: Any, x: Tensor) -> Tensor:
    return net.b(net.a(x).sort(dim=1).values)


def _in_place(net: Any, x: Tensor) -> Tensor:
    hidden = net.a(x)
    hidden.relu_()
    hidden += 1
    return net.b(hidden)


def _residual(net: Any, x: Tensor) -> Tensor:
    hidden = net.a(x)
    return net.c(hidden + net.b(hidden.relu()))


def _two_pads(net: Any, x: Tensor) -> Tensor:
    low = F.pad(net.a(x), (2, 0), value=0.0)
    return net.c(F.pad(low, (0, 2), value=1.0).tanh() + net.b(x))


def _by_position(net: Any, x: Tensor) -> Tensor:
    return net.b(net.a(x) * torch.arange(6.0))


def _flat(net: Any, x: Tensor) -> Tensor:
    return net.b(net.a(x[:, None, :, None]).flatten(1))


def _normed_by_hand(net: Any, x: Tensor) -> Tensor:
    hidden = net.a(x)
    hidden = (hidden - hidden.mean(-1, keepdim=True)) / (hidden.std(-1, keepdim=True) + 1)
    return net.b(hidden.softmax(-1))


def _image(net: Any, x: Tensor) -> Tensor:
    return net.c(net.b(net.a(x[:, None, :, None].expand(-1, 1, 6, 6))).mean((2, 3)))


def _recurrent(net: Any, x: Tensor) -> Tensor:
    state = x.new_zeros(len(x), 5)
    for step in range(3):
        state = (net.a(x[:, step : step + 1]) + net.b(state)).tanh()
    return net.c(state)


CASES: dict[str, tuple[nn.Module, list[int]]] = {
    "gated": (Net(_gated, a=lin(6, 10), b=lin(5, 2)), [5]),
    "dense": (Net(_dense, a=lin(6, 4), b=lin(4, 3), norm=nn.BatchNorm1d(7), c=lin(7, 2)), [3, 4]),
    "halves": (Net(_halves, a=lin(6, 7), b=lin(7, 2)), [3, 4]),
    "ring": (Net(_ring, a=lin(6, 4), b=lin(4, 2)), []),
    # Either of two places would be a guess.
    "twice": (Net(_twice, a=lin(6, 4), b=lin(8, 2)), []),
    "sorted": (Net(_sorted, a=lin(6, 4), b=lin(4, 2)), []),
    "in place": (Net(_in_place, a=lin(6, 4), b=lin(4, 2)), [4]),
    "residual": (Net(_residual, a=lin(6, 4), b=lin(4, 4), c=lin(4, 2)), [4]),
    "two pads": (Net(_two_pads, a=lin(6, 3), b=lin(6, 7), c=lin(7, 2)), [2, 2, 3]),
    "by position": (Net(_by_position, a=lin(6, 6), b=lin(6, 2)), []),
    "flat": (Net(_flat, a=nn.Conv2d(1, 4, (3, 1)), b=lin(16, 2)), [4]),
    "normed by hand": (Net(_normed_by_hand, a=lin(6, 5), b=lin(5, 2)), [5]),
    "depthwise": (
        Net(_image, a=nn.Conv2d(1, 4, 3), b=nn.Conv2d(4, 4, 3, groups=4), c=lin(4, 2)),
        [4],
    ),
    "grouped": (Net(_image, a=nn.Conv2d(1, 4, 3), b=nn.Conv2d(4, 6, 3, groups=2), c=lin(6, 2)), []),
    "transposed": (Net(_image, a=nn.Conv2d(1, 4, 3), b=nn.ConvTranspose2d(4, 3, 3), c=lin(3, 2)), [3, 4]),
    "group norm": (Net(_image, a=nn.Conv2d(1, 4, 3), b=nn.GroupNorm(2, 4), c=lin(4, 2)), []),
    "instance norm": (Net(_image, a=nn.Conv2d(1, 4, 3), b=nn.GroupNorm(4, 4), c=lin(4, 2)), [4]),
    "recurrent": (Net(_recurrent, a=lin(1, 5), b=lin(5, 5), c=lin(5, 2)), [5]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_module_of_the_users_own_is_followed(name: str) -> None:
    module, expected = CASES[name]
    module = randomised(module).double()
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        module(x)  # the module itself works
    symmetry = find_symmetry(module, x)
    assert sorted(sizes(symmetry)) == expected
    assert change(module, symmetry, x) == (pytest.approx(0, abs=1e-12), True)


def test_an_operation_without_a_rule_is_named() -> None:
    assert find_symmetry(CASES["sorted"][0], torch.zeros(2, 6, dtype=torch.float64)).blocked_by == ("sort",)


def test_tied_weights_move_together_under_both_names() -> None:
    module = Net(lambda net, x: net.c(net.b(net.a(x).relu()).relu()), a=lin(4, 4), b=lin(4, 4), c=lin(4, 2))
    module.get_submodule("b").weight = module.get_submodule("a").weight
    symmetry = find_symmetry(randomised(module), torch.zeros(1, 4))
    # The tied matrix takes the inputs, whose order is fixed, and gives what both layers give: only nothing may move.
    assert {place.tensor for group in symmetry.groups for place in group.places} <= {
        "a.bias", "a.weight", "b.weight", "b.bias", "c.weight",
    }  # fmt: skip
    assert change(module, symmetry, torch.randn(3, 4))[0] < 1e-5


def test_a_module_is_left_as_it_was() -> None:
    module = build_network({"name": "conv4", "width": 4, "num_classes": 2}).train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    symmetry = find_symmetry(module, torch.zeros(2, 784))
    check_symmetry(module, symmetry, torch.randn(2, 784))
    assert module.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_control_flow_that_asks_for_values_is_refused_by_name() -> None:
    module = Net(lambda net, x: net.a(x) if bool(x.sum() > 0) else x, a=lin(3, 3))
    with pytest.raises(SymmetryError, match=r"Net cannot be traced with inputs of shape \(2, 3\).*control flow"):
        find_symmetry(module, torch.zeros(2, 3))


def test_inputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SymmetryError, match=r"inputs of shape \(2, 5\)"):
        find_symmetry(build_network({"name": "tiny-cnn"}), torch.zeros(2, 5))


def test_a_wrong_symmetry_is_found_out() -> None:
    module = randomised(build_network({"name": "mlp", "widths": [4, 3, 2]}))
    right = find_symmetry(module, torch.zeros(1, 4))
    (group,) = right.groups
    wrong = Symmetry((type(group)(3, group.places[:1]),), ())
    with pytest.raises(SymmetryError, match="changes its outputs"):
        check_symmetry(module, wrong, torch.randn(2, 4))
    assert check_symmetry(module, right, torch.randn(2, 4)) < 1e-5
