from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from raywgen.tasks.ridge_head import STRENGTHS, RidgeHead, fit_ridge_head


def problem(num: int, num_classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of shifted classes that are not equally many, in float64."""
    generator = torch.Generator().manual_seed(seed)
    labels_S = torch.arange(num).remainder(num_classes + 1).clamp(max=num_classes - 1)
    features_SE = torch.randn(num, 7, dtype=torch.float64, generator=generator) + labels_S.unsqueeze(1)
    return features_SE, labels_S


def by_sklearn(features_SE: torch.Tensor, labels_S: torch.Tensor, num_classes: int, strength: float) -> Ridge:
    """Weighted ridge regression with the same penalty: weights sum to S there, and so does the penalty's unit."""
    count_C = labels_S.bincount()
    weight_S = (1 / count_C[labels_S].double()).numpy()
    weight_S = weight_S / weight_S.sum() * len(labels_S)
    centred_SE = features_SE.numpy() - np.average(features_SE.numpy(), axis=0, weights=weight_S)
    size = (weight_S[:, None] * centred_SE**2).sum(axis=1).mean()
    target_SC = torch.nn.functional.one_hot(labels_S, num_classes).double().numpy() - 1 / num_classes
    return Ridge(alpha=strength * size).fit(features_SE.numpy(), target_SC, sample_weight=weight_S)


@pytest.mark.parametrize(("num", "num_classes"), [(9, 2), (31, 3)])
@pytest.mark.parametrize("strength", STRENGTHS)
def test_a_head_is_weighted_ridge_regression(num: int, num_classes: int, strength: float) -> None:
    features_SE, labels_S = problem(num, num_classes)
    head = fit_ridge_head(features_SE.unsqueeze(0), labels_S.unsqueeze(0), num_classes, (strength,))
    wanted = by_sklearn(features_SE, labels_S, num_classes, strength)
    others_XE = features_SE.flip(1)
    found_XC = head(others_XE.unsqueeze(0))[0]
    assert torch.allclose(found_XC, torch.from_numpy(wanted.predict(others_XE.numpy())), atol=1e-9)


def test_left_out_outputs_are_those_of_heads_that_were_fitted_to_the_others() -> None:
    features_SE, labels_S = problem(14, 2)
    head = fit_ridge_head(features_SE.unsqueeze(0), labels_S.unsqueeze(0), 2, (0.1,))
    # With the same weights, centre and absolute penalty, which a smaller set would otherwise change.
    count_C = labels_S.bincount()
    weight_S = 1 / count_C[labels_S].double()
    weight_S = weight_S / weight_S.sum() * len(labels_S)
    mean_E = (weight_S.unsqueeze(1) * features_SE).mean(dim=0)
    alpha = 0.1 * float((weight_S.unsqueeze(1) * (features_SE - mean_E) ** 2).sum(dim=1).mean())
    target_SC = torch.nn.functional.one_hot(labels_S, 2).double() - 0.5
    for left_out in range(14):
        kept_S = torch.arange(14) != left_out
        one = Ridge(alpha=alpha).fit(
            features_SE[kept_S].numpy(), target_SC[kept_S].numpy(), sample_weight=weight_S[kept_S].numpy()
        )
        wanted_C = torch.from_numpy(one.predict(features_SE[left_out : left_out + 1].numpy()))[0]
        assert torch.allclose(head.left_out_BSC[0, left_out], wanted_C, atol=1e-9)


def test_the_strength_is_that_of_the_least_left_out_error_for_each_task() -> None:
    problems = [problem(20, 2, seed) for seed in (1, 2, 3)]
    noise_SE = torch.randn(20, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    features_BSE = torch.stack([*(x_SE for x_SE, _ in problems), noise_SE])
    labels_BS = torch.stack([*(labels_S for _, labels_S in problems), problems[0][1]])
    head = fit_ridge_head(features_BSE, labels_BS, 2)
    errors_PB = torch.stack(
        [_errors(fit_ridge_head(features_BSE, labels_BS, 2, (one,)), labels_BS) for one in STRENGTHS]
    )
    assert torch.allclose(_errors(head, labels_BS), errors_PB.min(dim=0).values)
    assert errors_PB.argmin(dim=0)[-1] > errors_PB.argmin(dim=0)[0], "noise wants a stronger penalty than classes"


def _errors(head: RidgeHead, labels_BS: torch.Tensor) -> torch.Tensor:
    """The squared errors by which strengths are compared, each class with the same weight."""
    target_BSC = torch.nn.functional.one_hot(labels_BS, 2).double() - 0.5
    count_BC = (target_BSC > 0).sum(dim=1)
    share_BS1 = (1 / count_BC.gather(1, labels_BS).double()).unsqueeze(-1)
    return (share_BS1 * (target_BSC - head.left_out_BSC) ** 2).sum(dim=(1, 2)) / share_BS1.sum(dim=(1, 2))


def test_gradients_of_the_features_are_right() -> None:
    features_SE, labels_S = problem(6, 2)

    def outputs(x_SE: torch.Tensor) -> torch.Tensor:
        head = fit_ridge_head(x_SE.unsqueeze(0), labels_S.unsqueeze(0), 2, (0.1,))
        return head(x_SE.unsqueeze(0).flip(2))

    assert torch.autograd.gradcheck(outputs, features_SE.requires_grad_())
