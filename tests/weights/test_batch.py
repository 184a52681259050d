"""What passes between floors: repeated conditions, and weights in generator units.

Shape legend: B networks, D values, S samples, F features.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from raywgen.weights import Condition, Layout, Normalizer


def test_a_condition_repeats_network_by_network() -> None:
    condition = Condition(
        instructions=("a", "b"),
        samples_BSF=torch.arange(12.0).reshape(2, 3, 2),
        labels_BS=torch.arange(6).reshape(2, 3),
    )
    repeated = condition.repeat(3)
    assert len(repeated) == 6
    assert repeated.instructions == ("a", "a", "a", "b", "b", "b")
    assert torch.equal(repeated.samples_BSF, condition.samples_BSF[[0, 0, 0, 1, 1, 1]])
    assert torch.equal(repeated.labels_BS, condition.labels_BS[[0, 0, 0, 1, 1, 1]])


def test_what_is_left_out_goes_with_its_networks() -> None:
    condition = Condition(
        instructions=("a", "b"), samples_BSF=torch.zeros(2, 3, 2), labels_BS=torch.zeros(2, 3, dtype=torch.int64)
    )
    assert condition.is_dropped_B2 is None
    by_text, by_samples = condition.reading(samples=False), condition.reading(instruction=False)
    joined = Condition.join([condition.first(1), by_text, by_samples.first(1)])
    assert joined.is_dropped_B2 is not None
    assert joined.is_dropped_B2.tolist() == [[False, False], [False, True], [False, True], [True, False]]
    for part in (joined.take(torch.tensor([3, 1])), joined.take(torch.tensor([3, 1])).to(torch.device("cpu"))):
        assert part.is_dropped_B2 is not None
        assert part.is_dropped_B2.tolist() == [[True, False], [False, True]]
    repeated = joined.first(2).repeat(2).is_dropped_B2
    assert repeated is not None
    assert repeated.tolist() == [[False, False], [False, False], [False, True], [False, True]]
    assert Condition.join([condition, condition]).is_dropped_B2 is None


@pytest.mark.parametrize("shared_start", [True, False])
def test_normalised_weights_have_unit_scale_per_tensor_and_come_back(shared_start: bool) -> None:
    layout = Layout.from_state_dict(nn.Linear(6, 4).state_dict())
    generator = torch.Generator().manual_seed(0)
    base_D = torch.randn(layout.num_values, generator=generator)
    spread_D = torch.cat([torch.full((24,), 0.2), torch.full((4,), 30.0)])
    offset_ND = spread_D * torch.randn(50, layout.num_values, generator=generator)
    values_ND = base_D + offset_ND if shared_start else offset_ND
    normalizer = Normalizer.measure(layout, values_ND, base_D if shared_start else None)
    normalised_ND = normalizer.normalise(values_ND)
    for part in (normalised_ND[:, :24], normalised_ND[:, 24:]):
        assert part.std(unbiased=False).item() == pytest.approx(1.0, abs=1e-5)
    # One float32 subtraction and addition around values up to about 100.
    assert torch.allclose(normalizer.denormalise(normalised_ND), values_ND, atol=1e-4)


def test_a_tensor_that_never_varies_stays_finite() -> None:
    layout = Layout.from_state_dict({"a": torch.zeros(3)})
    normalizer = Normalizer.measure(layout, torch.ones(5, 3), None)
    assert bool(torch.isfinite(normalizer.normalise(torch.ones(2, 3))).all())
