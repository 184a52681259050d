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


def moments(per: str, values_BD: Tensor, at_once: int = 10**6) -> tuple[Tensor, Tensor]:
    """Means and mean squares by group, of networks of which no more than so many values are read at once."""
    groups = groups_of(LAYOUT, per)

    def read(start: int, stop: int) -> Tensor:
        assert stop - start <= at_once
        return values_BD[:, start:stop]

    mean_BM, square_BG = groups.moments(read).split([groups.num_means, groups.num_groups], dim=1)
    tables = groups.tables(torch.device("cpu"))
    return mean_BM[:, tables.mean_place_G[list(groups.with_mean)]], square_BG[:, tables.scale_place_G]


@pytest.mark.parametrize(("per", "num"), [("tensor", 8), ("filter", 5 + 3 + 6)])
def test_moments_are_those_of_the_parts(per: str, num: int) -> None:
    values_BD = torch.randn(3, LAYOUT.num_values, generator=torch.Generator().manual_seed(0)) + 2
    groups = groups_of(LAYOUT, per)
    assert len(groups.firsts) == len(groups.kinds) == num
    mean_BM, square_BG = moments(per, values_BD)
    for b in range(3):
        parts = [part.double() for part in parts_of(values_BD[b], per)]
        has_mean = [group in groups.with_mean for group in range(num)]
        about = [part.mean() * has for part, has in zip(parts, has_mean, strict=True)]
        squares_G = torch.stack([(part - mean).square().mean() for part, mean in zip(parts, about, strict=True)])
        torch.testing.assert_close(square_BG[b].double(), squares_G, rtol=1e-5, atol=0)
        means_M = torch.stack([parts[group].mean() for group in groups.with_mean])
        torch.testing.assert_close(mean_BM[b].double(), means_M, rtol=1e-5, atol=1e-6)


def test_moments_do_not_depend_on_how_much_is_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values_BD = torch.randn(3, LAYOUT.num_values, generator=torch.Generator().manual_seed(0)) + 2
    monkeypatch.setattr("raywgen.weights.groups._SUMMED", 16)
    for per in ("tensor", "filter"):
        whole = moments(per, values_BD)
        monkeypatch.setattr("raywgen.weights.groups._READ", 32)
        for found, expected in zip(moments(per, values_BD, 32), whole, strict=True):
            assert torch.equal(found, expected)
        for found, expected in zip(moments(per, values_BD[1:2], 32), whole, strict=True):
            assert torch.equal(found, expected[1:2])
        monkeypatch.undo()
        monkeypatch.setattr("raywgen.weights.groups._SUMMED", 16)


def test_vectors_have_means_and_matrices_have_none() -> None:
    kinds = {KINDS[groups_of(LAYOUT, "tensor").kinds[group]] for group in groups_of(LAYOUT, "tensor").with_mean}
    assert kinds == {"bias", "norm_scale", "norm_shift", "running_mean", "running_var"}


@pytest.mark.parametrize("per", ["tensor", "filter"])
def test_numbers_stand_over_their_own_values(per: str) -> None:
    groups = groups_of(LAYOUT, per)
    numbers_BG = torch.arange(2.0 * len(groups.firsts)).view(2, -1) + 1
    over_BD = groups.over_values(numbers_BG)
    assert over_BD.shape == (2, LAYOUT.num_values)
    assert torch.equal(over_BD[:, list(groups.firsts)], numbers_BG)
    assert torch.equal(over_BD, numbers_BG[:, groups.of_values(torch.arange(LAYOUT.num_values))])


@pytest.mark.parametrize("per", ["tensor", "filter"])
@pytest.mark.parametrize("length", [1, 7, 50, 10**4])
def test_no_window_touches_more_groups_than_is_said(per: str, length: int) -> None:
    groups, last = groups_of(LAYOUT, per), LAYOUT.num_values - 1
    group_D = groups.of_values(torch.arange(LAYOUT.num_values))
    touched = [int(group_D[min(start + length - 1, last)] - group_D[start]) + 1 for start in range(LAYOUT.num_values)]
    assert groups.most_touched(length) == max(touched)


def test_short_rows_share_their_tensors_scale() -> None:
    # Depthwise filters of 9 values, and rows of 16.
    depthwise, wide = (layout_of(nn.Conv2d(8, 8, k, groups=8, bias=False)) for k in (3, 4))
    assert len(groups_of(depthwise, "filter").firsts) == 1
    assert len(groups_of(wide, "filter").firsts) == 8


def test_a_tensor_without_values_is_in_no_group() -> None:
    layout = Layout.from_state_dict({"weight": torch.zeros(0, 4), "bias": torch.zeros(3)})
    groups = groups_of(layout, "filter")
    assert groups.rows == ((1, 3),)
    assert groups.moments(lambda start, stop: torch.ones(2, 3)[:, start:stop]).tolist() == [[1.0, 0.0]] * 2
