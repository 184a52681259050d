"""A linear classifier on each sample, fitted to the others, beside scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from torch import Tensor

from raywgen.tasks.linear_reference import left_out_accuracy
from raywgen.tasks.ridge_head import STRENGTHS


def blobs(num: int, num_features: int, apart: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels_S = torch.arange(num) % 3
    centres = apart * torch.randn(3, num_features, generator=generator)
    return centres[labels_S] + torch.randn(num, num_features, generator=generator), labels_S


def test_it_is_ridge_regression_with_each_sample_left_out() -> None:
    x, y = blobs(60, 5, apart=0.8)
    centred = x.double() - x.double().mean(dim=0)
    size = float(centred.square().sum(dim=1).mean())
    targets = torch.nn.functional.one_hot(y, 3).double().numpy() - 1 / 3
    found = [
        cross_val_predict(Ridge(alpha=one * size), x.double().numpy(), targets, cv=LeaveOneOut()) for one in STRENGTHS
    ]
    best = min(found, key=lambda outputs: float(np.square(outputs - targets).mean()))
    accuracy = float((torch.from_numpy(best).argmax(dim=1) == y).double().mean())
    assert left_out_accuracy(x, y) == pytest.approx(accuracy, abs=1 / 60 + 1e-9)
    assert 0.5 < accuracy < 1


@pytest.mark.parametrize(("apart", "least", "most"), [(6.0, 0.97, 1.0), (0.0, 0.0, 0.47)])
def test_it_says_what_can_be_learned(apart: float, least: float, most: float) -> None:
    # Without a difference it is no better than a guess among three: 1/3 and three standard deviations for 120 samples.
    # It may be worse, because a class is rarer among the others for each of its samples.
    assert least <= left_out_accuracy(*blobs(120, 8, apart)) <= most


def test_labels_may_have_gaps_and_samples_be_images_or_many() -> None:
    x, y = blobs(1000, 9, apart=6.0)
    plain = left_out_accuracy(x, y)
    assert left_out_accuracy(x.view(-1, 1, 3, 3), 5 * y + 2) == plain > 0.97
