"""Finite scalar quantisation: round trips, and its error on a Gaussian beside the best scalar quantiser's.

Shape legend: N vectors, K values, L tokens, V levels.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raywgen.nn.quantisers import FiniteScalarQuantiser
from raywgen.nn.quantisers.finite_scalar import gaussian_levels


def quantiser(num_levels: int, values_per_token: int = 2, width: int = 4) -> FiniteScalarQuantiser:
    return FiniteScalarQuantiser(num_levels, values_per_token, width)


@given(num_levels=st.integers(2, 40), data=st.data())
@settings(max_examples=40)
def test_every_token_comes_back_from_its_own_values(num_levels: int, data: st.DataObject) -> None:
    scalar = quantiser(num_levels)
    codes_NL = torch.tensor([data.draw(st.tuples(*[st.integers(0, num_levels**2 - 1)] * 2))])
    assert torch.equal(scalar.encode(scalar.decode(codes_NL)), codes_NL)


@pytest.mark.parametrize(("num_levels", "lloyd_max_db"), [(2, 4.40), (4, 9.30), (8, 14.62), (16, 20.22)])
def test_on_a_gaussian_it_is_nearly_the_best_scalar_quantiser(num_levels: int, lloyd_max_db: float) -> None:
    scalar = quantiser(num_levels)
    # Quantiles of the Gaussian stand for a sample of it without its scatter.
    value_X = torch.special.ndtri((torch.arange(1 << 16, dtype=torch.float64) + 0.5) / (1 << 16)).float()
    vectors_NK = value_X.view(-1, 4)
    error_NK = scalar.decode(scalar.encode(vectors_NK)) - vectors_NK
    snr_db = float(10 * torch.log10(vectors_NK.square().sum() / error_NK.square().sum()))
    # Lloyd-Max (Max 1960, table I) is the ceiling, up to the finite sample; tanh cells lose at most 0.75 dB.
    assert lloyd_max_db - 0.75 < snr_db < lloyd_max_db + 0.02


def test_points_are_the_means_of_their_cells() -> None:
    scalar = quantiser(5, 1, 1)
    value_N1 = torch.randn(400_000, 1, generator=torch.Generator().manual_seed(0))
    codes_N = scalar.encode(value_N1)[:, 0]
    means = torch.stack([value_N1[codes_N == level].mean() for level in range(5)])
    # Each mean is over at least 20,000 values of deviation below 0.5.
    torch.testing.assert_close(scalar.points_V, means, rtol=0, atol=0.015)


def test_the_grid_is_symmetric_and_rises() -> None:
    for num_levels in (2, 3, 8):
        _, points_V = gaussian_levels(num_levels)
        torch.testing.assert_close(points_V, -points_V.flip(0), rtol=0, atol=1e-9)
        assert bool((points_V.diff() > 0).all())


def test_initialise_follows_the_scale() -> None:
    unit, large = quantiser(8), quantiser(8)
    vectors_NK = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    unit.initialise(vectors_NK, 0, torch.Generator())
    large.initialise(16 * vectors_NK, 0, torch.Generator())
    assert torch.equal(unit.encode(vectors_NK), large.encode(16 * vectors_NK))
    torch.testing.assert_close(16 * unit.points_V, large.points_V)


def test_points_follow_data_that_are_no_gaussian() -> None:
    scalar = quantiser(4, 1, 1)
    value_N1 = torch.rand(4000, 1, generator=torch.Generator().manual_seed(0)) ** 3
    scalar.initialise(value_N1, 0, torch.Generator())
    codes_N = scalar.encode(value_N1)[:, 0]
    for level in set(codes_N.tolist()):
        torch.testing.assert_close(scalar.points_V[level], value_N1[codes_N == level].mean(), rtol=1e-4, atol=1e-6)


def test_it_asks_for_no_loss_of_its_own() -> None:
    assert float(quantiser(4).train()(torch.randn(5, 4)).loss) == 0.0
