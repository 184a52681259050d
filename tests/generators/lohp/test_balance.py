"""Balance objectives against double loops over windows in plain Python, their limits, and their gradients.

All in float64. Shape legend: B paths, L steps; `...` coordinates.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raywgen.generators.lohp.balance import (
    detailed_balance_loss,
    potentials,
    sub_trajectory_balance_loss,
    trajectory_balance_loss,
    window_weights,
)

pytestmark = pytest.mark.usefixtures("one_thread")

B = 3
LENGTHS = st.integers(1, 8)
LAMBDAS = st.sampled_from([0.1, 0.5, 0.9, 1.0, 1.1, 2.0, 10.0])


@dataclass(frozen=True, kw_only=True)
class Paths:
    """What flow and kernels say of some paths."""

    log_flow: Tensor
    log_forward: Tensor
    log_backward: Tensor

    @property
    def g(self) -> Tensor:
        return potentials(self.log_flow, self.log_forward, self.log_backward)

    def residual(self, m: int, n: int) -> Tensor:
        """From its definition, `(B, ...)`."""
        forward, backward = (log_prob[:, m:n].sum(dim=1) for log_prob in (self.log_forward, self.log_backward))
        return self.log_flow[:, m] + forward - self.log_flow[:, n] - backward


@st.composite
def paths(draw: st.DrawFn) -> Paths:
    L = draw(LENGTHS)
    trailing = draw(st.sampled_from([(), (1,), (4,), (2, 3)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    log_flow, log_forward, log_backward = (
        torch.randn(B, states, *trailing, generator=generator, dtype=torch.float64) for states in (L + 1, L, L)
    )
    # A level common to all flows, such as a large normaliser, must not cost digits.
    return Paths(log_flow=log_flow + 100, log_forward=3 * log_forward, log_backward=3 * log_backward)


@given(one=paths())
@settings(max_examples=40)
def test_potentials_hold_the_residual_of_every_window(one: Paths) -> None:
    g = one.g
    for m, n in itertools.combinations(range(g.shape[1]), 2):
        # Sums of numbers near 100: 14 digits of them.
        torch.testing.assert_close(g[:, m] - g[:, n], one.residual(m, n), rtol=0, atol=1e-11)


@given(one=paths(), lam=LAMBDAS, data=st.data())
@settings(max_examples=60)
def test_sub_trajectory_balance_is_its_double_loop(one: Paths, lam: float, data: st.DataObject) -> None:
    g = one.g
    L = g.shape[1] - 1
    max_length = data.draw(st.none() | st.integers(1, L + 2))
    longest = L if max_length is None else max_length
    windows = [(m, n) for m, n in itertools.combinations(range(L + 1), 2) if n - m <= longest]
    total = sum(lam ** (n - m) * float(one.residual(m, n).square().mean()) for m, n in windows)
    expected = total / sum(lam ** (n - m) for m, n in windows)
    found = float(sub_trajectory_balance_loss(g, lam, max_length))
    # Centred potentials are 10 or so; squares that cancel to a small residual keep 1e-14 of theirs.
    assert found == pytest.approx(expected, rel=1e-11, abs=1e-12)


@given(one=paths(), lam=LAMBDAS)
@settings(max_examples=30)
def test_windows_of_length_1_are_detailed_balance(one: Paths, lam: float) -> None:
    g = one.g
    L = g.shape[1] - 1
    expected = sum(float(one.residual(t, t + 1).square().mean()) for t in range(L)) / L
    assert float(detailed_balance_loss(g)) == pytest.approx(expected, rel=1e-12)
    assert float(sub_trajectory_balance_loss(g, lam, max_length=1)) == pytest.approx(expected, rel=1e-12)
    assert float(sub_trajectory_balance_loss(g, 1e-300)) == pytest.approx(expected, rel=1e-12)


@given(one=paths())
@settings(max_examples=30)
def test_one_full_window_is_trajectory_balance(one: Paths) -> None:
    g = one.g
    L = g.shape[1] - 1
    expected = float(one.residual(0, L).square().mean())
    # Its residual of order 1 is a difference of numbers near 100, squared.
    assert float(trajectory_balance_loss(g)) == pytest.approx(expected, rel=1e-11, abs=1e-13)
    # All other windows together weigh less than a digit of float64.
    found = float(sub_trajectory_balance_loss(g, 1e100))
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-12)
    if L == 1:
        assert float(sub_trajectory_balance_loss(g, 0.7)) == pytest.approx(expected, rel=1e-12, abs=1e-13)


@given(L=st.integers(1, 300), lam=LAMBDAS | st.sampled_from([1e-300, 1e300]), max_length=st.none() | LENGTHS)
@settings(max_examples=60)
def test_window_weights_are_normalised_and_geometric_whatever_lam(L: int, lam: float, max_length: int | None) -> None:
    W_SS = window_weights(L, lam, max_length)
    assert W_SS.isfinite().all()
    assert torch.equal(W_SS, W_SS.T)
    # A sum of up to 45,000 numbers.
    assert float(W_SS.triu(1).sum()) == pytest.approx(1, rel=1e-10)
    assert not W_SS.diagonal().any()
    longest = min(L, max_length or L)
    assert not W_SS.triu(longest + 1).any()
    of_length = W_SS[0, 1 : longest + 1].tolist()
    for shorter, longer in itertools.pairwise(of_length):
        # Ratios of what has not underflown; exponents are near 1e3 at most, of which exp keeps 1e-13.
        if min(shorter, longer) > 1e-290:
            assert longer / shorter == pytest.approx(lam, rel=1e-11)


def test_balanced_paths_cost_nothing_and_constants_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    log_forward, log_backward = torch.randn(2, B, 6, 2, generator=generator, dtype=torch.float64)
    gained = torch.cat([torch.zeros(B, 1, 2, dtype=torch.float64), (log_forward - log_backward).cumsum(1)], dim=1)
    g = potentials(gained + 1e3, log_forward, log_backward)
    for loss in (trajectory_balance_loss, detailed_balance_loss, lambda g: sub_trajectory_balance_loss(g, 0.9)):
        # Rounding of 1e3, squared.
        assert float(loss(g)) == pytest.approx(0, abs=1e-24)


OBJECTIVES: dict[str, Callable[[Tensor], Tensor]] = {
    "detailed": detailed_balance_loss,
    "trajectory": trajectory_balance_loss,
    "sub_trajectory": lambda g: sub_trajectory_balance_loss(g, 0.9),
    "short_windows": lambda g: sub_trajectory_balance_loss(g, 1.5, max_length=2),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_are_finite_differences(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [
        torch.randn(B, states, 2, generator=generator, dtype=torch.float64, requires_grad=True) for states in (5, 4, 4)
    ]
    assert torch.autograd.gradcheck(lambda *parts: OBJECTIVES[name](potentials(*parts)), parts)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_mean_over_mixed_paths_is_the_hybrid_objective(name: str) -> None:
    on, off = torch.randn(30, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).split([24, 6])
    loss = OBJECTIVES[name]
    torch.testing.assert_close(loss(torch.cat([on, off])), 0.8 * loss(on) + 0.2 * loss(off))


@pytest.mark.parametrize("lam", [0.0, -1.0, math.inf, math.nan])
def test_lam_is_a_positive_number(lam: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        sub_trajectory_balance_loss(torch.zeros(1, 3), lam)


def test_windows_have_a_length() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        sub_trajectory_balance_loss(torch.zeros(1, 3), 0.9, max_length=0)
