"""Groups of values that share a scale: which they are, and their means and sizes against loops over tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from raywgen.weights import Layout
from raywgen.weights.groups import groups_of
from raywgen.weights.tensors import KINDS


def layout_of(module: nn.Module) -> Layout:
    return Layout.from_state_dict(module.state_dict())


LAYOUT = layout_of(nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(20, 3)))


def parts_of(values_D: Tensor, per: str) -> list[Tensor]:
    """Written out by hand: tensors, or rows of the convolution (18 values) and of the linear layer (20)."""
    state = LAYOUT.unflatten(values_D)
    parts: list[Tensor] = []
    for spec in LAYOUT.generated:
        tensor = state[spec.name]
        parts += list(tensor.flatten(1)) if per == "filter" and tensor.dim() > 1 else [tensor.flatten()]
    return parts


@pytest.mark.parametrize(("per", "num"), [("tensor", 8), ("filter", 5 + 3 + 6)])
def test_means_and_sizes_are_those_of_the_parts(per: str, num: int) -> None:
    values_BD = torch.randn(3, LAYOUT.num_values, generator=torch.Generator().manual_seed(0)) + 2
    groups = groups_of(LAYOUT, per)
    assert len(groups.firsts) == len(groups.kinds) == num
    for b in range(3):
        parts = parts_of(values_BD[b], per)
        sizes_G = torch.stack([part.double().square().mean().sqrt() for part in parts])
        torch.testing.assert_close(groups.sizes(values_BD)[b].double(), sizes_G, rtol=1e-5, atol=0)
        means_V = torch.stack([parts[group].double().mean() for group in groups.with_mean])
        torch.testing.assert_close(groups.means(values_BD)[b].double(), means_V, rtol=1e-5, atol=1e-6)


def test_vectors_have_means_and_matrices_have_none() -> None:
    kinds = {KINDS[groups_of(LAYOUT, "tensor").kinds[group]] for group in groups_of(LAYOUT, "tensor").with_mean}
    assert kinds == {"bias", "norm_scale", "norm_shift", "running_mean", "running_var"}


@pytest.mark.parametrize("per", ["tensor", "filter"])
def test_numbers_stand_over_their_own_values(per: str) -> None:
    groups = groups_of(LAYOUT, per)
    numbers_BG = torch.arange(2.0 * len(groups.firsts)).view(2, -1) + 1
    over_BD = groups.over_values(numbers_BG)
    assert over_BD.shape == (2, LAYOUT.num_values)
    # A group's size is its number, where all of its values are that number.
    torch.testing.assert_close(groups.sizes(over_BD), numbers_BG)
    assert torch.equal(over_BD[:, list(groups.firsts)], numbers_BG)


def test_means_stand_over_vectors_alone() -> None:
    groups = groups_of(LAYOUT, "filter")
    means_BV = torch.rand(2, len(groups.with_mean)) + 1
    over_BD = groups.means_over_values(means_BV)
    torch.testing.assert_close(groups.means(over_BD), means_BV)
    is_matrix_D = torch.cat([torch.full((spec.num_values,), len(spec.shape) > 1) for spec in LAYOUT.generated])
    assert bool((over_BD[:, is_matrix_D] == 0).all())
    assert bool((over_BD[:, ~is_matrix_D] != 0).all())


def test_short_rows_share_their_tensors_scale() -> None:
    # Depthwise filters of 9 values, and rows of 16.
    depthwise, wide = (layout_of(nn.Conv2d(8, 8, k, groups=8, bias=False)) for k in (3, 4))
    assert len(groups_of(depthwise, "filter").firsts) == 1
    assert len(groups_of(wide, "filter").firsts) == 8


def test_a_tensor_without_values_is_in_no_group() -> None:
    layout = Layout.from_state_dict({"weight": torch.zeros(0, 4), "bias": torch.zeros(3)})
    groups = groups_of(layout, "filter")
    assert groups.rows == ((1, 3),)
    assert groups.means(torch.ones(2, 3)).shape == (2, 1)
