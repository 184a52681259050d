"""Scores of mixtures, against figures counted by hand and brute force."""

from __future__ import annotations

import math

import pytest
import torch

from raywgen.evaluation.mixtures import calibration_error, mixture_log_probs, mixture_score


def test_two_networks_that_contradict_each_other_leave_even_odds() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    right = 20.0 * torch.nn.functional.one_hot(labels, 2).double()
    mixture = mixture_score(torch.stack([right, -right]), labels)
    assert mixture.log_likelihood == pytest.approx(math.log(0.5))
    sure = mixture_score(right.unsqueeze(0), labels)
    assert (sure.accuracy, sure.log_likelihood) == (1.0, pytest.approx(0.0, abs=1e-8))
    assert sure.calibration_error == pytest.approx(0.0, abs=1e-8)
    # One alone that is always sure and always wrong is off by all of its confidence.
    wrong = mixture_score(-right.unsqueeze(0), labels)
    assert (wrong.accuracy, wrong.calibration_error) == (0.0, pytest.approx(1.0))
    assert wrong.log_likelihood == pytest.approx(-20.0, abs=1e-6)


def test_a_mixture_has_the_mean_of_the_probabilities() -> None:
    logits = torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(mixture_log_probs(logits).exp(), logits.softmax(dim=-1).mean(dim=0))


def test_the_calibration_error_is_that_of_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.randn(400, 3, generator=generator).double().mul(2).softmax(dim=1)
    labels = torch.randint(3, (400,), generator=generator)
    confidence, answers = probabilities.max(dim=1)
    total = 0.0
    for index in range(15):
        own = (confidence > index / 15) & (confidence <= (index + 1) / 15)
        if own.any():
            gap = (answers[own] == labels[own]).double().mean() - confidence[own].mean()
            total += float(own.double().mean() * gap.abs())
    assert total > 0.1
    assert calibration_error(probabilities, labels) == pytest.approx(total, rel=1e-9)
