"""The layer of outputs that is fitted to samples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from raywgen.generators.units.fitted_output import FittedOutput
from raywgen.generators.units.samples import Activations


def samples(num: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two tasks, each with inputs and the classes that a hidden direction gives them."""
    generator = torch.Generator().manual_seed(seed)
    x_BSX = torch.randn(2, num, width, generator=generator, dtype=torch.float64) + 1.0
    way_BX = torch.randn(2, width, generator=generator, dtype=torch.float64)
    return x_BSX, ((x_BSX - 1.0) @ way_BX.unsqueeze(-1)).squeeze(-1).gt(0).long()


def activations(x_BSX: Tensor, member_BSC: Tensor) -> Activations:
    return Activations(x_BSX.unsqueeze(-1), member_BSC)


def one_hot(labels_BS: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(labels_BS, 2).double()


@pytest.mark.parametrize("num", [60, 8])  # More samples than values, and fewer.
@pytest.mark.parametrize("has_bias", [True, False])
def test_it_is_weighted_ridge_regression(num: int, has_bias: bool) -> None:
    """Against gradient-free least squares on rows that are stacked with those of the penalty."""
    x_BSX, labels_BS = samples(num, 20)
    fitted = FittedOutput().double()
    rows_BnX, bias_Bn = fitted(activations(x_BSX, one_hot(labels_BS)), 2, has_bias)
    scale, strength = fitted.log_scale.exp(), fitted.log_strength.exp()
    for x_SX, labels_S, rows_nX, bias_n in zip(x_BSX, labels_BS, rows_BnX, bias_Bn, strict=True):
        weight_S = 1 / (2 * labels_S.bincount(minlength=2).clamp(min=1)[labels_S].double())
        assert weight_S.sum() == pytest.approx(1.0)
        target_SC = one_hot(labels_S) - 0.5
        centre_X = (weight_S @ x_SX) * has_bias
        root_S1 = weight_S.sqrt().unsqueeze(1)
        left_SX, right_SC = root_S1 * (x_SX - centre_X), root_S1 * target_SC
        penalty = (strength * left_SX.square().sum() / 20).sqrt()
        left = torch.cat([left_SX, penalty * torch.eye(20, dtype=torch.float64)])
        right = torch.cat([right_SC, torch.zeros(20, 2, dtype=torch.float64)])
        expected_XC = torch.linalg.lstsq(left, right).solution
        assert torch.allclose(rows_nX, scale * expected_XC.mT, atol=1e-9)
        assert torch.allclose(bias_n, -scale * centre_X @ expected_XC, atol=1e-9)


def test_half_a_membership_counts_half() -> None:
    x_BSX, labels_BS = samples(12, 5)
    twice = torch.cat([one_hot(labels_BS)] * 2, dim=1) / 2
    once = FittedOutput().double()(activations(x_BSX, one_hot(labels_BS)), 2, True)
    doubled = FittedOutput().double()(activations(torch.cat([x_BSX] * 2, dim=1), twice), 2, True)
    for one, other in zip(once, doubled, strict=True):
        assert torch.allclose(one, other, atol=1e-9)


def test_samples_of_no_class_and_classes_of_no_sample_change_nothing() -> None:
    x_BSX, labels_BS = samples(12, 5)
    member_BSC = one_hot(labels_BS)
    rows_BnX, bias_Bn = FittedOutput().double()(activations(x_BSX, member_BSC), 2, True)
    more_x, more_member = torch.cat([x_BSX, x_BSX + 3], dim=1), torch.cat([member_BSC, 0 * member_BSC], dim=1)
    found = FittedOutput().double()(activations(more_x, more_member), 4, True)
    assert torch.allclose(found[0][:, :2], rows_BnX, atol=1e-9)
    assert torch.allclose(found[1][:, :2], bias_Bn, atol=1e-9)
    assert not found[0][:, 2:].any()
    assert not found[1][:, 2:].any()
    alone = FittedOutput().double()(activations(x_BSX, torch.nn.functional.pad(member_BSC, (0, 1))), 3, True)
    assert all(bool(each.isfinite().all()) for each in alone)


def test_predicted_memberships_have_gradients_also_where_they_are_zero() -> None:
    x_BSX, labels_BS = samples(30, 5)
    member_BSC = (one_hot(labels_BS) * torch.arange(30).gt(9).view(1, -1, 1)).requires_grad_()
    rows_BnX, _ = FittedOutput().double()(activations(x_BSX, member_BSC), 2, True)
    rows_BnX.square().sum().backward()
    assert member_BSC.grad is not None
    assert bool(member_BSC.grad.isfinite().all())
    assert member_BSC.grad.any()
