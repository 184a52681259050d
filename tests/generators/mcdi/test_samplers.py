"""Samplers on Gaussian weights, whose best prediction is linear in the state, and along a known trajectory.

For weights of mean m and covariance S the state is Gaussian too, and

    E[w | x_t] = m + sqrt(abar_t) S (abar_t S + (1 - abar_t) I)^-1 (x_t - sqrt(abar_t) m)

All in float64. Shape legend: B samples, D values.
"""

from __future__ import annotations

import itertools
import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raywgen.generators.mcdi.local_consistency import Parameterisation
from raywgen.generators.mcdi.samplers import Predict, Sampler, sample
from raywgen.generators.mcdi.schedule import Schedule, ScheduleKind
from raywgen.weights import KeyedNoise

pytestmark = pytest.mark.usefixtures("one_thread")

D = 3
MEAN_D = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
FACTOR_DD = torch.tensor([[0.6, 0.0, 0.0], [0.3, 0.5, 0.0], [-0.4, 0.2, 0.9]], dtype=torch.float64)
COVARIANCE_DD = FACTOR_DD @ FACTOR_DD.T
EYE_DD = torch.eye(D, dtype=torch.float64)
chains = st.integers(1, 40).flatmap(lambda T: st.tuples(st.just(T), st.integers(1, T)))


def gain(abar: float) -> Tensor:
    """How the best prediction of weights moves with the state, `(D, D)`."""
    return abar**0.5 * COVARIANCE_DD @ torch.linalg.inv(abar * COVARIANCE_DD + (1 - abar) * EYE_DD)


def best_prediction(
    schedule: Schedule, parameterisation: Parameterisation, seen: list[Tensor] | None = None
) -> Predict:
    """What a denoiser that has learned everything says; notes the states it is asked about."""

    def predict(x_BD: Tensor, t_B: Tensor) -> Tensor:
        assert t_B.shape == x_BD.shape[:1]
        assert t_B.unique().numel() == 1
        if seen is not None:
            seen.append(x_BD)
        abar = float(schedule.abar_T[t_B[0]])
        weights_BD = MEAN_D + (x_BD - abar**0.5 * MEAN_D) @ gain(abar).T
        return weights_BD if parameterisation == "weights" else (x_BD - abar**0.5 * weights_BD) / (1 - abar) ** 0.5

    return predict


def affine_map(schedule: Schedule, sampler: Sampler) -> tuple[Tensor, Tensor]:
    """A sampler without noise maps its start x to `A x + b` here: `(D, D)` and `(D,)`."""
    start_BD = torch.cat([torch.zeros(1, D, dtype=torch.float64), EYE_DD])
    predict = best_prediction(schedule, "weights")
    steps = schedule.num_steps
    end_BD = sample(predict, start_BD, schedule, parameterisation="weights", sampler=sampler, num_steps=steps)
    return (end_BD[1:] - end_BD[0]).T, end_BD[0]


@pytest.mark.parametrize("kind", get_args(ScheduleKind))
def test_the_deterministic_sampler_reaches_mean_and_covariance_as_steps_grow(kind: ScheduleKind) -> None:
    errors = []
    for T in (100, 200, 400):
        A, b = affine_map(Schedule.make(kind, T, 1), "deterministic")
        errors.append(float(torch.cat([(A @ A.T - COVARIANCE_DD).flatten(), b - MEAN_D]).abs().max()))
    # A first-order method: its error halves as the steps double, until the signal in the first state is left.
    assert errors[1] < 0.65 * errors[0]
    assert errors[2] < 0.65 * errors[1]
    assert errors[2] < 0.03


def stochastic_moments(schedule: Schedule, num_steps: int) -> tuple[Tensor, Tensor]:
    """Mean and covariance at the end of the stochastic sampler, by its linear recursion from N(0, I)."""
    mean_D, covariance_DD = torch.zeros(D, dtype=torch.float64), EYE_DD
    stops = [round(schedule.num_steps * s / num_steps) for s in range(num_steps + 1)]
    for t, u in itertools.pairwise(stops):
        abar_t, abar_u = float(schedule.abar_T[t]), float(schedule.abar_T[u])
        alpha = abar_t / abar_u
        f_DD = (EYE_DD - abar_t**0.5 * gain(abar_t)) / (1 - abar_t) ** 0.5
        step_DD = (EYE_DD - (1 - alpha) / (1 - abar_t) ** 0.5 * f_DD) / alpha**0.5
        # Where the state is sqrt(abar_t) m, so is its mean step, at u.
        mean_D = abar_u**0.5 * MEAN_D + step_DD @ (mean_D - abar_t**0.5 * MEAN_D)
        variance = (1 - alpha) * (1 - abar_u) / (1 - abar_t)
        covariance_DD = step_DD @ covariance_DD @ step_DD.T + variance * EYE_DD
    return mean_D, covariance_DD


def assert_moments(schedule: Schedule, num_steps: int, mean_D: Tensor, covariance_DD: Tensor, slack: float) -> None:
    """Of 10,000 stochastic samples, to within four standard errors and what the caller knows to be left."""
    N = 10_000
    noise = KeyedNoise(0, torch.arange(N))
    samples_ND = sample(
        best_prediction(schedule, "weights"),
        noise.normal(D).double(),
        schedule,
        parameterisation="weights",
        sampler="stochastic",
        num_steps=num_steps,
        noise=noise,
    )
    variance_D = covariance_DD.diagonal()
    assert bool(((samples_ND.mean(dim=0) - mean_D).abs() < 4 * (variance_D / N).sqrt() + slack).all())
    standard_error_DD = ((covariance_DD.square() + torch.outer(variance_D, variance_D)) / N).sqrt()
    assert bool(((samples_ND.T.cov() - covariance_DD).abs() < 4 * standard_error_DD + slack).all())


@pytest.mark.parametrize("kind", get_args(ScheduleKind))
def test_the_stochastic_sampler_reaches_mean_and_covariance_as_steps_grow(kind: ScheduleKind) -> None:
    errors = []
    for T in (100, 200, 400):
        mean_D, covariance_DD = stochastic_moments(Schedule.make(kind, T, 1), T)
        errors.append(float(torch.cat([(covariance_DD - COVARIANCE_DD).flatten(), mean_D - MEAN_D]).abs().max()))
    # A first-order method: its error halves as the steps double.
    assert all(after < 0.65 * before for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.025
    # What 200 steps leave is 0.042 with the linear schedule, where the largest variance is 1.01.
    assert_moments(Schedule.make(kind, 200, 1), 200, MEAN_D, COVARIANCE_DD, slack=0.045)


@pytest.mark.parametrize("num_steps", [100, 12, 3, 1])
@pytest.mark.parametrize("kind", get_args(ScheduleKind))
def test_stochastic_samples_have_the_moments_of_their_linear_recursion(kind: ScheduleKind, num_steps: int) -> None:
    schedule = Schedule.make(kind, 100, 1)
    # Where a single step leaves next to no variance, rounding remains.
    assert_moments(schedule, num_steps, *stochastic_moments(schedule, num_steps), slack=1e-9)


@pytest.mark.parametrize("parameterisation", ["weights", "noise"])
@given(kind=st.sampled_from(get_args(ScheduleKind)), chain=chains)
@settings(max_examples=30)
def test_the_mean_sampler_gives_the_mean_of_the_weights_given_its_start(
    parameterisation: Parameterisation, kind: ScheduleKind, chain: tuple[int, int]
) -> None:
    """Its linear recursion telescopes: however many steps it takes, it is the best prediction at t = 0."""
    T, num_steps = chain
    schedule = Schedule.make(kind, T, 1)
    start_BD = torch.randn(4, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    end_BD = sample(
        best_prediction(schedule, parameterisation),
        start_BD,
        schedule,
        parameterisation=parameterisation,
        sampler="mean",
        num_steps=num_steps,
    )
    abar = float(schedule.abar_T[0])
    expected_BD = MEAN_D + (start_BD - abar**0.5 * MEAN_D) @ gain(abar).T
    # Noise prediction divides by the root of the first signal, 1e-5.
    torch.testing.assert_close(end_BD, expected_BD, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("sampler", get_args(Sampler))
@given(kind=st.sampled_from(get_args(ScheduleKind)), chain=chains)
@settings(max_examples=20)
def test_noise_and_weight_prediction_walk_the_same_path(
    sampler: Sampler, kind: ScheduleKind, chain: tuple[int, int]
) -> None:
    T, num_steps = chain
    schedule = Schedule.make(kind, T, 1)
    start_BD = torch.randn(4, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    paths = []
    for parameterisation in ("weights", "noise"):
        seen: list[Tensor] = []
        end_BD = sample(
            best_prediction(schedule, parameterisation, seen),
            start_BD,
            schedule,
            parameterisation=parameterisation,
            sampler=sampler,
            num_steps=num_steps,
            noise=KeyedNoise(0, torch.arange(4)),
        )
        paths.append(torch.stack([*seen, end_BD]))
    assert len(paths[0]) == num_steps + 1
    # Noise prediction divides by the root of the first signal, 1e-5.
    torch.testing.assert_close(paths[0], paths[1], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("sampler", get_args(Sampler))
def test_the_deterministic_and_the_mean_step_by_hand(sampler: Sampler) -> None:
    schedule = Schedule.make("cosine", 4, 1)
    start_BD, f_BD = torch.randn(2, 4, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    asked: list[int] = []

    def predict(x_BD: Tensor, t_B: Tensor) -> Tensor:
        asked.append(int(t_B[0]))
        return f_BD

    found_BD = sample(
        predict,
        start_BD,
        schedule,
        parameterisation="noise",
        sampler=sampler,
        num_steps=2,
        noise=KeyedNoise(0, torch.arange(4)),
    )
    assert asked == [0, 2]
    start, middle = (float(schedule.abar_T[t]) for t in asked)
    alpha = start / middle
    if sampler == "deterministic":
        weights_BD = (start_BD - math.sqrt(1 - start) * f_BD) / math.sqrt(start)
        x_BD = math.sqrt(middle) * weights_BD + math.sqrt(1 - middle) * f_BD
    else:
        x_BD = (start_BD - (1 - alpha) / math.sqrt(1 - start) * f_BD) / math.sqrt(alpha)
    if sampler == "stochastic":
        noise_BD = KeyedNoise(0, torch.arange(4)).normal(D)
        x_BD = x_BD + math.sqrt((1 - alpha) * (1 - middle) / (1 - start)) * noise_BD
    expected_BD = (x_BD - math.sqrt(1 - middle) * f_BD) / math.sqrt(middle)
    torch.testing.assert_close(found_BD, expected_BD, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sampler", get_args(Sampler))
@given(kind=st.sampled_from(get_args(ScheduleKind)), chain=chains)
@settings(max_examples=20)
def test_the_last_step_returns_the_predicted_weights(
    sampler: Sampler, kind: ScheduleKind, chain: tuple[int, int]
) -> None:
    T, num_steps = chain
    schedule = Schedule.make(kind, T, 1)
    asked: list[int] = []
    predicted: list[Tensor] = []

    def predict(x_BD: Tensor, t_B: Tensor) -> Tensor:
        asked.append(int(t_B[0]))
        predicted.append(torch.randn(x_BD.shape, generator=torch.Generator().manual_seed(len(asked))))
        return predicted[-1]

    end_BD = sample(
        predict,
        torch.zeros(4, D),
        schedule,
        parameterisation="weights",
        sampler=sampler,
        num_steps=num_steps,
        noise=KeyedNoise(0, torch.arange(4)),
    )
    assert asked == [t for t, _ in schedule.steps(num_steps)]
    assert asked[0] == 0
    assert torch.equal(end_BD, predicted[-1])


def test_noise_of_the_stochastic_sampler_is_keyed_by_sample_and_scaled_by_temperature() -> None:
    schedule = Schedule.make("cosine", 8, 1)
    start_BD = torch.randn(4, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def walk(start: Tensor, noise: KeyedNoise, sampler: Sampler = "stochastic", temperature: float = 1.0) -> Tensor:
        predict = best_prediction(schedule, "weights")
        return sample(
            predict,
            start,
            schedule,
            parameterisation="weights",
            sampler=sampler,
            num_steps=8,
            noise=noise,
            temperature=temperature,
        )

    whole_BD = walk(start_BD, KeyedNoise(3, torch.arange(4)))
    torch.testing.assert_close(walk(start_BD[2:], KeyedNoise(3, torch.arange(2, 4))), whole_BD[2:], rtol=1e-12, atol=0)
    assert not torch.allclose(walk(start_BD, KeyedNoise(4, torch.arange(4))), whole_BD, atol=1e-3)
    cold_BD = walk(start_BD, KeyedNoise(3, torch.arange(4)), temperature=0.0)
    mean_BD = walk(start_BD, KeyedNoise(3, torch.arange(4)), sampler="mean")
    assert torch.equal(cold_BD, mean_BD)
    half_BD = walk(start_BD, KeyedNoise(3, torch.arange(4)), temperature=0.5)
    # The walk is linear in its noise here.
    torch.testing.assert_close(half_BD, (whole_BD + mean_BD) / 2, rtol=1e-12, atol=1e-12)


@st.composite
def trajectories(draw: st.DrawFn) -> tuple[Schedule, Tensor]:
    """A chain and k local targets `(k, D)`."""
    T = draw(st.integers(1, 40))
    k = draw(st.integers(1, min(T, 5)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    targets_AD = torch.randn(k, D, generator=generator, dtype=torch.float64)
    return Schedule.make(draw(st.sampled_from(get_args(ScheduleKind))), T, k), targets_AD


@pytest.mark.parametrize("parameterisation", ["weights", "noise"])
@given(trajectory=trajectories())
@settings(max_examples=40)
def test_a_walk_without_loss_on_each_segment_is_at_each_local_target_when_its_chain_ends(
    parameterisation: Parameterisation, trajectory: tuple[Schedule, Tensor]
) -> None:
    """With the prediction that is without loss for chain i, between the ends of chains i - 1 and i.

    The start does not matter: the mean step to the end of a local chain forgets its state.
    """
    schedule, targets_AD = trajectory
    T = schedule.num_steps
    seen: list[Tensor] = []

    def predict(x_BD: Tensor, t_B: Tensor) -> Tensor:
        seen.append(x_BD)
        t = int(t_B[0])
        i = next(i for i, end in enumerate(schedule.ends) if t < end)
        abar = float(schedule.abar_T[t])
        local = abar / float(schedule.abar_T[schedule.ends[i]])
        eps_BD = (x_BD - local**0.5 * targets_AD[i]) / (1 - local) ** 0.5
        f_BD = ((1 - abar) / (1 - local)) ** 0.5 * eps_BD
        return f_BD if parameterisation == "noise" else (x_BD - (1 - abar) ** 0.5 * f_BD) / abar**0.5

    start_BD = torch.randn(2, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    end_BD = sample(predict, start_BD, schedule, parameterisation=parameterisation, sampler="mean", num_steps=T)
    states = [*seen, end_BD]
    for i, end in enumerate(schedule.ends):
        # Signals of 1e-5 amplify rounding by 300 in each conversion.
        torch.testing.assert_close(states[end], targets_AD[i].expand(2, D), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sampler", get_args(Sampler))
@given(trajectory=trajectories(), data=st.data())
@settings(max_examples=30)
def test_a_walk_whose_last_step_lies_in_the_last_segment_ends_where_that_segment_says(
    sampler: Sampler, trajectory: tuple[Schedule, Tensor], data: st.DataObject
) -> None:
    """From the last but one end on only one local chain is left, so its best prediction is the end itself."""
    schedule, targets_AD = trajectory
    T = schedule.num_steps
    num_steps = data.draw(st.integers(1, T))
    last_but_one = (0, *schedule.ends)[-2]

    def predict(x_BD: Tensor, t_B: Tensor) -> Tensor:
        # Anywhere before: whatever a compromise between several local targets may be.
        return targets_AD[-1].expand_as(x_BD) if int(t_B[0]) >= last_but_one else 3.0 * x_BD + targets_AD[0]

    start_BD = torch.randn(2, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    end_BD = sample(
        predict,
        start_BD,
        schedule,
        parameterisation="weights",
        sampler=sampler,
        num_steps=num_steps,
        noise=KeyedNoise(0, torch.arange(2)),
    )
    is_in_last_segment = schedule.steps(num_steps)[-1][0] >= last_but_one
    assert torch.equal(end_BD, targets_AD[-1].expand(2, D)) == is_in_last_segment
