"""Kernels of paths against torch's normal, the joint covariance of Brownian motion, and exact balance.

All in float64. Shape legend: B paths, L steps, D coordinates.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal

from raywgen.generators.lohp.balance import (
    detailed_balance_loss,
    potentials,
    sub_trajectory_balance_loss,
    trajectory_balance_loss,
)
from raywgen.generators.lohp.kernels import bridge_log_prob, forward_log_prob, sample_bridge

pytestmark = pytest.mark.usefixtures("one_thread")

D = 3
SEEDS = st.integers(0, 2**31)
SIGMAS = st.floats(0.05, 4.0)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(seed=SEEDS, sigma=SIGMAS)
@settings(max_examples=30)
def test_a_forward_step_is_normal(seed: int, sigma: float) -> None:
    x_next, x, drift = normal(seed, 3, 2, 4, D)
    expected = Normal(x + drift, sigma).log_prob(x_next)
    torch.testing.assert_close(forward_log_prob(x_next, x, drift, sigma), expected, rtol=1e-12, atol=1e-12)
    sigma_D = torch.tensor([sigma, 1.0, 2.0], dtype=torch.float64)
    expected = Normal(x + drift, sigma_D).log_prob(x_next)
    torch.testing.assert_close(forward_log_prob(x_next, x, drift, sigma_D), expected, rtol=1e-12, atol=1e-12)


@given(seed=SEEDS, sigma=SIGMAS, n=st.integers(1, 200))
@settings(max_examples=40)
def test_the_bridge_is_the_conditional_of_brownian_motion(seed: int, sigma: float, n: int) -> None:
    """Of `(s_n, s_{n+1})`, whose covariance is `sigma^2 min(i, j)`."""
    x, x_next, start = normal(seed, 3, 4, D)
    joint = sigma**2 * torch.tensor([[n, n], [n, n + 1]], dtype=torch.float64)
    mean = start + joint[0, 1] / joint[1, 1] * (x_next - start)
    variance = joint[0, 0] - joint[0, 1] ** 2 / joint[1, 1]
    # The variance is a difference of numbers 200 times as large.
    expected = Normal(mean, variance.sqrt()).log_prob(x)
    torch.testing.assert_close(bridge_log_prob(x, x_next, start, n, sigma), expected, rtol=1e-11, atol=1e-11)


def test_a_tensor_of_steps_broadcasts_and_the_start_is_certain() -> None:
    B, L, sigma = 2, 5, 0.7
    states_BLD = normal(0, B, L + 1, D).requires_grad_()
    start_B1D = states_BLD[:, :1]
    n_L1 = torch.arange(L).unsqueeze(-1)
    together = bridge_log_prob(states_BLD[:, :-1], states_BLD[:, 1:], start_B1D, n_L1, sigma)
    assert together.shape == (B, L, D)
    for n in range(L):
        alone = bridge_log_prob(states_BLD[:, n], states_BLD[:, n + 1], states_BLD[:, 0], n, sigma)
        torch.testing.assert_close(together[:, n], alone, rtol=1e-14, atol=0)
    assert not together[:, 0].any()
    (gradient_BLD,) = torch.autograd.grad(together.sum(), states_BLD)
    assert gradient_BLD.isfinite().all()


@pytest.mark.parametrize("length", [1, 2, 6])
def test_sampled_bridges_have_the_mean_and_covariance_of_bridges(length: int) -> None:
    """`sigma^2 (min(i, j) - i j / L)` between states i and j, and no covariance between coordinates."""
    N, sigma = 40_000, 1.3
    start_D, end_D = normal(1, 2, D)
    states_NSD = sample_bridge(start_D.expand(N, D), end_D.expand(N, D), length, sigma, normal(2, N, length - 1, D))
    assert states_NSD.shape == (N, length + 1, D)
    assert torch.equal(states_NSD[:, 0], start_D.expand(N, D))
    assert torch.equal(states_NSD[:, -1], end_D.expand(N, D))
    n_S = torch.arange(length + 1, dtype=torch.float64)
    mean_SD = start_D + (n_S / length).unsqueeze(-1) * (end_D - start_D)
    covariance_SS = sigma**2 * (torch.minimum(n_S.unsqueeze(1), n_S) - n_S.unsqueeze(1) * n_S / length)
    # Five standard errors of the widest state; a covariance of normal values varies by at most sqrt(2) of variances.
    largest = float(covariance_SS.max())
    slack = 5 / math.sqrt(N)
    torch.testing.assert_close(states_NSD.mean(dim=0), mean_SD, rtol=0, atol=slack * math.sqrt(largest) + 1e-12)
    centred_NSD = states_NSD - mean_SD
    found_SSDD = torch.einsum("nsd,nte->stde", centred_NSD, centred_NSD) / N
    expected_SSDD = covariance_SS[..., None, None] * torch.eye(D, dtype=torch.float64)
    torch.testing.assert_close(found_SSDD, expected_SSDD, rtol=0, atol=slack * math.sqrt(2) * largest + 1e-12)


def test_a_tensor_of_spreads_is_one_bridge_per_coordinate() -> None:
    noise_BLD, sigma_D = normal(0, 4, 5, D), torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    start_BD, end_BD = normal(1, 2, 4, D)
    together = sample_bridge(start_BD, end_BD, 6, sigma_D, noise_BLD)
    for d in range(D):
        alone = sample_bridge(start_BD[:, [d]], end_BD[:, [d]], 6, float(sigma_D[d]), noise_BLD[..., [d]])
        torch.testing.assert_close(together[..., [d]], alone, rtol=1e-14, atol=0)


@given(seed=SEEDS, sigma=SIGMAS, L=st.integers(1, 30))
@settings(max_examples=40)
def test_brownian_motion_with_drift_balances_exactly(seed: int, sigma: float, L: int) -> None:
    """Its flow is its density `N(start + t d, t sigma^2)`, 1 at t = 0, at whatever states."""
    B = 2
    start_BD, d_BD = normal(seed, 2, B, D)
    n_L1 = torch.arange(1, L + 1, dtype=torch.float64).unsqueeze(-1)
    # As wide as the motion: densities far from it would be sums of large numbers.
    later_BLD = start_BD.unsqueeze(1) + n_L1 * d_BD.unsqueeze(1) + sigma * n_L1.sqrt() * normal(seed + 1, B, L, D)
    states_BLD = torch.cat([start_BD.unsqueeze(1), later_BLD], dim=1)
    start_B1D, d_B1D = start_BD.unsqueeze(1), d_BD.unsqueeze(1)
    log_later_BLD = Normal(start_B1D + n_L1 * d_B1D, n_L1.sqrt() * sigma).log_prob(later_BLD)
    log_flow = torch.cat([torch.zeros(B, 1, D, dtype=torch.float64), log_later_BLD], dim=1)
    log_forward = forward_log_prob(states_BLD[:, 1:], states_BLD[:, :-1], d_B1D, sigma)
    log_backward = bridge_log_prob(states_BLD[:, :-1], states_BLD[:, 1:], start_B1D, n_L1 - 1, sigma)
    g = potentials(log_flow, log_forward, log_backward)
    # Steps at random states are up to 50 spreads wide, states up to 100 / sigma: 1e-16 of both, multiplied.
    torch.testing.assert_close(g[:, :1].expand_as(g), g, rtol=0, atol=1e-10)
    for loss in (trajectory_balance_loss, detailed_balance_loss, lambda g: sub_trajectory_balance_loss(g, 2.0)):
        assert float(loss(g)) < 1e-20
