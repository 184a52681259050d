"""The local consistency loss against its equation in plain Python, and against what it is for.

All in float64. Shape legend: B samples, D values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raywgen.generators.mcdi.local_consistency import Parameterisation, Weighting, local_consistency_loss, noised
from raywgen.generators.mcdi.samplers import mean_step
from raywgen.generators.mcdi.schedule import Schedule, ScheduleKind

pytestmark = pytest.mark.usefixtures("one_thread")

D = 5


@dataclass(frozen=True, kw_only=True)
class Case:
    """One sample of one local chain, at one step."""

    schedule: Schedule
    t: int
    end: int
    target_1D: Tensor
    eps_1D: Tensor
    other_1D: Tensor

    @property
    def abar(self) -> float:
        return float(self.schedule.abar_T[self.t])

    @property
    def local_abar(self) -> float:
        return self.abar / float(self.schedule.abar_T[self.end])

    @property
    def x_1D(self) -> Tensor:
        return noised(self.target_1D, torch.tensor([self.local_abar], dtype=torch.float64), self.eps_1D)

    def loss(self, prediction_1D: Tensor, parameterisation: Parameterisation, weighting: Weighting = "paper") -> float:
        abar_B, local_B = (torch.tensor([value], dtype=torch.float64) for value in (self.abar, self.local_abar))
        loss_B = local_consistency_loss(
            prediction_1D,
            self.target_1D,
            self.eps_1D,
            abar_B,
            local_B,
            parameterisation=parameterisation,
            weighting=weighting,
        )
        assert loss_B.shape == (1,)
        return float(loss_B)

    def noise_of(self, weights_1D: Tensor) -> Tensor:
        """The noise that a prediction of weights stands for."""
        return (self.x_1D - math.sqrt(self.abar) * weights_1D) / math.sqrt(1 - self.abar)

    def weights_of(self, noise_1D: Tensor) -> Tensor:
        return (self.x_1D - math.sqrt(1 - self.abar) * noise_1D) / math.sqrt(self.abar)

    def wanted_noise(self) -> Tensor:
        """The only prediction without loss."""
        return math.sqrt((1 - self.abar) / (1 - self.local_abar)) * self.eps_1D


@st.composite
def cases(draw: st.DrawFn, num_targets: int | None = None) -> Case:
    T = draw(st.integers(1, 40))
    k = draw(st.integers(1, min(T, 5))) if num_targets is None else num_targets
    schedule = Schedule.make(draw(st.sampled_from(get_args(ScheduleKind))), T, k)
    end = draw(st.sampled_from(schedule.ends))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    target_1D, eps_1D, other_1D = torch.randn(3, 1, D, generator=generator, dtype=torch.float64)
    t = draw(st.integers(0, end - 1))
    return Case(schedule=schedule, t=t, end=end, target_1D=target_1D, eps_1D=eps_1D, other_1D=other_1D)


@given(case=cases())
@settings(max_examples=60)
def test_noise_prediction_is_the_equation(case: Case) -> None:
    squares = [
        (math.sqrt(1 - case.local_abar) * f - math.sqrt(1 - case.abar) * e) ** 2
        for f, e in zip(case.other_1D[0].tolist(), case.eps_1D[0].tolist(), strict=True)
    ]
    # The same few operations; differences of numbers near 1 carry 1e-16.
    assert case.loss(case.other_1D, "noise") == pytest.approx(sum(squares) / D, rel=1e-12)
    x = [
        math.sqrt(case.local_abar) * target + math.sqrt(1 - case.local_abar) * e
        for target, e in zip(case.target_1D[0].tolist(), case.eps_1D[0].tolist(), strict=True)
    ]
    assert case.x_1D[0].tolist() == pytest.approx(x, rel=1e-14, abs=1e-15)


@given(case=cases(num_targets=1))
@settings(max_examples=60)
def test_one_target_gives_the_vanilla_loss(case: Case) -> None:
    assert case.local_abar == case.abar
    distance = float((case.other_1D - case.eps_1D).square().sum())
    # Machine precision: 1e-16 of the products whose difference is squared.
    assert case.loss(case.other_1D, "noise") == pytest.approx((1 - case.abar) * distance / D, rel=1e-14)


@pytest.mark.parametrize("weighting", ["local", "weights"])
@given(case=cases(num_targets=1))
@settings(max_examples=30)
def test_one_target_and_weight_prediction_give_the_distance_to_the_target(weighting: Weighting, case: Case) -> None:
    distance = float((case.other_1D - case.target_1D).square().mean())
    # 1 - abar is above 1e-5 and divides; the rounding of a few operations remains.
    assert case.loss(case.other_1D, "weights", weighting) == pytest.approx(distance, rel=1e-9)


@pytest.mark.parametrize("weighting", get_args(Weighting))
@given(case=cases())
@settings(max_examples=40)
def test_predicted_weights_cost_what_the_noise_costs_that_they_stand_for(weighting: Weighting, case: Case) -> None:
    expected = case.loss(case.noise_of(case.other_1D), "noise", weighting)
    # With 1 - abar^i of 1e-4 and more, the two sides lose 4 of 16 digits each to their differences.
    assert case.loss(case.other_1D, "weights", weighting) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("weighting", get_args(Weighting))
@given(case=cases())
@settings(max_examples=40)
def test_weightings_are_factors_of_the_squared_residual(weighting: Weighting, case: Case) -> None:
    abar, local = case.abar, case.local_abar
    factor = {
        "paper": 1.0,
        "noise": 1 / (1 - abar),
        "weights": (1 - abar) / (abar * (1 - local)),
        "local": (1 - local) / (local * (1 - abar)),
    }[weighting]
    expected = factor * case.loss(case.other_1D, "noise", "paper")
    assert case.loss(case.other_1D, "noise", weighting) == pytest.approx(expected, rel=1e-12)


@given(case=cases())
@settings(max_examples=60)
def test_each_weighting_is_uniform_in_what_it_is_named_after(case: Case) -> None:
    f_1D, w_1D = case.other_1D, case.weights_of(case.other_1D)
    implied_eps_1D = math.sqrt((1 - case.local_abar) / (1 - case.abar)) * f_1D
    implied_1D = (case.x_1D - math.sqrt(1 - case.local_abar) * implied_eps_1D) / math.sqrt(case.local_abar)
    wanted_1D = case.weights_of(case.wanted_noise())
    weightings: tuple[tuple[Weighting, Tensor, Tensor], ...] = (
        ("noise", implied_eps_1D, case.eps_1D),
        ("weights", w_1D, wanted_1D),
        ("local", implied_1D, case.target_1D),
    )
    for weighting, found_1D, aim_1D in weightings:
        # Signals of 1e-5 amplify rounding by 300, and it is squared.
        expected = float((found_1D - aim_1D).square().mean())
        assert case.loss(f_1D, "noise", weighting) == pytest.approx(expected, rel=1e-8), weighting


@pytest.mark.parametrize("parameterisation", ["noise", "weights"])
@given(case=cases(), data=st.data())
@settings(max_examples=80)
def test_without_loss_the_samplers_mean_step_is_that_of_the_local_chain(
    parameterisation: Parameterisation, case: Case, data: st.DataObject
) -> None:
    f_1D = case.wanted_noise()
    prediction_1D = f_1D if parameterisation == "noise" else case.weights_of(f_1D)
    # Rounding alone: predicted weights are divided by signals down to 1e-5.
    assert case.loss(prediction_1D, parameterisation) < 1e-20
    u = data.draw(st.integers(case.t + 1, case.end))
    alpha = math.prod(float(case.schedule.abar_T[j] / case.schedule.abar_T[j + 1]) for j in range(case.t, u))
    local_1D = (case.x_1D - (1 - alpha) / math.sqrt(1 - case.local_abar) * case.eps_1D) / math.sqrt(alpha)
    step_1D = mean_step(case.x_1D, prediction_1D, case.abar, float(case.schedule.abar_T[u]), parameterisation)
    # The step divides by the root of an alpha that many steps at once make as small as 1e-5.
    torch.testing.assert_close(step_1D, local_1D, rtol=1e-9, atol=1e-10)
    if u == case.end:
        torch.testing.assert_close(step_1D, case.target_1D, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("parameterisation", ["noise", "weights"])
@given(case=cases())
@settings(max_examples=60)
def test_the_loss_is_the_distance_of_the_two_mean_steps(parameterisation: Parameterisation, case: Case) -> None:
    """So nothing but the local chain's own step is without loss."""
    abar_t, abar_u = case.abar, float(case.schedule.abar_T[case.t + 1])
    alpha = abar_t / abar_u
    step_1D = mean_step(case.x_1D, case.other_1D, abar_t, abar_u, parameterisation)
    local_1D = (case.x_1D - (1 - alpha) / math.sqrt(1 - case.local_abar) * case.eps_1D) / math.sqrt(alpha)
    distance = float((step_1D - local_1D).square().mean())
    factor = (1 - alpha) ** 2 / (alpha * (1 - case.abar) * (1 - case.local_abar))
    # The last steps of long chains move by 1e-3 of the state: 13 digits of the difference, squared.
    assert factor * case.loss(case.other_1D, parameterisation) == pytest.approx(distance, rel=1e-8)


@pytest.mark.parametrize("parameterisation", ["noise", "weights"])
@pytest.mark.parametrize("weighting", get_args(Weighting))
def test_a_batch_is_its_samples_one_by_one(parameterisation: Parameterisation, weighting: Weighting) -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, target, eps = torch.randn(3, 2, 4, D, generator=generator, dtype=torch.float64)
    local = torch.rand(2, 4, generator=generator, dtype=torch.float64) * 0.9 + 0.05
    abar = local * torch.rand(2, 4, generator=generator, dtype=torch.float64)
    loss = partial(local_consistency_loss, parameterisation=parameterisation, weighting=weighting)
    together = loss(prediction, target, eps, abar, local)
    for b in range(2):
        for n in range(4):
            one = (tensor[b, n].unsqueeze(0) for tensor in (prediction, target, eps, abar, local))
            torch.testing.assert_close(together[b, n], loss(*one)[0], rtol=1e-14, atol=0)


def test_where_a_trajectory_stands_still_its_local_targets_still_ask_for_different_weights() -> None:
    """A local chain is without loss at other predictions than the global one, except after the last but one end.

    At t = 0, where nothing of the state is signal, chain i asks for `theta_i / sqrt(abar at its end)`.
    """
    schedule = Schedule.make("cosine", 20, 3)
    target_1D, eps_1D = torch.randn(2, 1, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for end in schedule.ends:
        case = Case(schedule=schedule, t=0, end=end, target_1D=target_1D, eps_1D=eps_1D, other_1D=target_1D)
        asked_1D = case.weights_of(case.wanted_noise())
        scaled_1D = target_1D / schedule.abar_T[end].sqrt()
        # A signal of 5e-4 at the most is left, and enters by its root.
        torch.testing.assert_close(asked_1D, scaled_1D, rtol=0.03, atol=0.03)
        assert (case.loss(target_1D, "weights") < 1e-20) == (end == 20)
