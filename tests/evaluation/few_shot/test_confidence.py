import numpy as np
import pytest
import torch

from raywgen.evaluation.few_shot import FewShotError, estimate, paired_difference


def test_mean_and_interval_by_hand() -> None:
    found = estimate(torch.tensor([1.0, 0.0, 1.0, 1.0]))
    # Variance (0.0625 * 3 + 0.5625) / 3 = 0.25.
    assert found.mean == 0.75
    assert found.half_width == pytest.approx(1.96 * 0.5 / 2)


def test_the_interval_holds_the_true_mean_in_95_of_100_cases() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(1000):
        found = estimate(torch.from_numpy(rng.binomial(25, 0.9, size=200) / 25))
        inside += abs(found.mean - 0.9) <= found.half_width
    assert 930 <= inside <= 970


def test_pairs_are_surer_than_their_sides() -> None:
    rng = torch.Generator().manual_seed(0)
    hardness = torch.rand(300, generator=rng)
    values, other = hardness + 0.02, hardness + 0.01 * torch.randn(300, generator=rng)
    found = paired_difference(values, other)
    assert found.mean == pytest.approx(float(values.mean() - other.mean()), abs=1e-6)
    assert found.half_width == pytest.approx(1.96 * float((values - other).std()) / 300**0.5, rel=1e-4)
    assert found.half_width < estimate(values).half_width / 10


def test_too_few_or_unequal_values_are_refused() -> None:
    with pytest.raises(FewShotError, match="at least two"):
        estimate(torch.ones(1))
    with pytest.raises(FewShotError, match="no pairs"):
        paired_difference(torch.ones(3), torch.ones(2))
