"""What a network is worth beside chance, by figures that can be counted by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from raywgen.tasks.standing import BETTER, LIKE, UNKNOWN, WEAK, WORSE, standing


def answers(given: list[int], num_classes: int = 2) -> Tensor:
    return 4.0 * torch.nn.functional.one_hot(torch.tensor(given), num_classes).float()


def test_figures_are_those_counted_by_hand() -> None:
    # Of eight samples of class 0 six are right, of two of class 1 one.
    labels = torch.tensor([0] * 8 + [1] * 2)
    found = standing(answers([0] * 6 + [1] * 2 + [0, 1]), labels)
    assert found.accuracy == pytest.approx((6 / 8 + 1 / 2) / 2)
    assert found.share_right == pytest.approx(7 / 10)
    assert (found.chance, found.majority, found.num_samples, found.num_classes) == (0.5, 0.8, 10, 2)
    right, wrong = math.log(1 + math.exp(-4)), math.log(1 + math.exp(4))
    assert found.loss == pytest.approx(((6 * right + 2 * wrong) / 8 + (right + wrong) / 2) / 2, rel=1e-5)
    assert found.guess_loss == pytest.approx(math.log(2))
    for part in (
        "accuracy 0.62",
        "chance 0.50",
        "0.70 of all 10 samples",
        "most frequent class alone 0.80",
        found.verdict,
    ):
        assert part in found.sentence()


def test_the_probability_is_that_of_fishers_exact_test() -> None:
    # Tables with margins (8, 8) and (8, 8): six or more right in each class has 0.0660 + 0.0051 + 0.0001 / ... by
    # the hypergeometric distribution: P(X >= 6) = (C(8,6)C(8,2) + C(8,7)C(8,1) + C(8,8)C(8,0)) / C(16,8).
    exact = sum(math.comb(8, k) * math.comb(8, 8 - k) for k in (6, 7, 8)) / math.comb(16, 8)
    labels = torch.tensor([0] * 8 + [1] * 8)
    found = standing(answers([0] * 6 + [1] * 2 + [0] * 2 + [1] * 6), labels)
    # 4,000 tables: three standard deviations.
    assert found.p_above == pytest.approx(exact, abs=3 * math.sqrt(exact / 4000))


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        ([0] * 16 + [1] * 16, BETTER),
        ([1] * 16 + [0] * 16, WORSE),
        ([0] * 32, LIKE),
        ([0, 1] * 16, LIKE),
        ([1] * 12 + [0] * 4 + [0] * 12 + [1] * 4, WORSE),
    ],
)
def test_verdicts(given: list[int], verdict: str) -> None:
    found = standing(answers(given), torch.tensor([0] * 16 + [1] * 16))
    assert found.verdict == verdict
    assert found.is_doubtful == (verdict != BETTER)


def test_one_answer_for_all_is_no_better_than_chance_however_frequent_its_class() -> None:
    found = standing(answers([0] * 64), torch.tensor([0] * 60 + [1] * 4))
    assert found.share_right == pytest.approx(60 / 64)
    assert found.verdict == LIKE


def test_the_best_of_many_needs_more_to_be_believed() -> None:
    labels = torch.tensor([0] * 16 + [1] * 16)
    given = answers([0] * 11 + [1] * 5 + [0] * 5 + [1] * 11)
    assert standing(given, labels).verdict == BETTER
    assert standing(given, labels, best_of=64).verdict == LIKE


def test_too_few_samples_warn_only_of_what_is_wrong() -> None:
    labels = torch.tensor([0, 1])
    assert standing(answers([0, 1]), labels).verdict == UNKNOWN
    assert standing(answers([0, 0]), labels).is_doubtful
    assert standing(answers([0, 0]), torch.tensor([0, 0])).verdict == UNKNOWN


def test_answers_beyond_the_classes_asked_for_are_wrong_ones() -> None:
    labels = torch.tensor([1, 3] * 8)
    found = standing(answers([9, 3] * 8, num_classes=10), labels)
    assert (found.accuracy, found.chance, found.num_classes) == (0.5, 0.5, 2)
    assert not standing(answers([1, 3] * 8, num_classes=10), labels).is_doubtful


def test_what_is_not_finite_has_an_infinite_loss() -> None:
    assert standing(torch.full((4, 2), torch.nan), torch.tensor([0, 1, 0, 1])).loss == math.inf


def test_a_network_worse_than_a_linear_classifier_of_the_samples_is_doubtful() -> None:
    labels = torch.tensor([0, 1] * 16)
    most = labels.clone()
    most[:4] = 1 - most[:4]
    given = answers(most.tolist())
    assert (standing(given, labels).verdict, standing(given, labels, linear=28 / 32).verdict) == (BETTER, BETTER)
    beside = standing(given, labels, linear=1.0)
    assert (beside.verdict, beside.linear, beside.is_doubtful) == (WEAK, 1.0, True)
    assert "a linear classifier of the other samples 1.00" in beside.sentence()


def test_a_linear_classifier_that_is_better_within_its_own_error_raises_no_doubt() -> None:
    labels = torch.tensor([0, 1] * 32)
    off = labels.clone()
    off[:6] = 1 - off[:6]
    near = standing(answers(off.tolist()), labels, linear=60 / 64)
    assert near.accuracy == pytest.approx(58 / 64)
    assert (near.verdict, near.is_below_linear) == (BETTER, False)
    # The same share of rounding as a float32 mean has.
    assert not standing(answers(off.tolist()), labels, linear=58 / 64 + 1e-7).is_doubtful
    # 60 right of 64 have an error of sqrt(61 / 66 * 5 / 66 / 64) = 0.033, about 2 samples.
    off[6:8] = 1 - off[6:8]
    assert standing(answers(off.tolist()), labels, linear=60 / 64).verdict == WEAK
