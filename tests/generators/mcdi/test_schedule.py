"""Schedules of short chains against products of alphas in plain Python."""

from __future__ import annotations

import itertools
import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raywgen.config import ConfigError, load_config
from raywgen.generators.mcdi.config import DiffusionConfig
from raywgen.generators.mcdi.schedule import Schedule, ScheduleKind

pytestmark = pytest.mark.usefixtures("one_thread")

SMALLEST_ALPHA = 0.02
chains = st.integers(1, 60).flatmap(lambda T: st.tuples(st.just(T), st.integers(1, T)))


def alphas(kind: ScheduleKind, num_steps: int) -> list[float]:
    """By the schedules' own formulas; the last step first, as noise falls along the chain."""
    if kind == "cosine":
        signal = [math.sin(math.pi / 2 * t / num_steps) ** 2 for t in range(num_steps + 1)]
        return [max(before / after, SMALLEST_ALPHA) for before, after in itertools.pairwise(signal)]
    slope = (0.02 - 1e-4) / max(1, num_steps - 1)
    betas = [(0.02 - slope * t) * 1000 / num_steps for t in range(num_steps)]
    return [max(1 - beta, SMALLEST_ALPHA) for beta in betas]


@pytest.mark.parametrize("kind", get_args(ScheduleKind))
@given(chain=chains)
@settings(max_examples=40)
def test_the_global_signal_is_the_product_of_the_alphas_that_are_left(
    kind: ScheduleKind, chain: tuple[int, int]
) -> None:
    T, k = chain
    schedule = Schedule.make(kind, T, k)
    assert schedule.num_steps == T
    expected = [math.prod(alphas(kind, T)[t:]) for t in range(T + 1)]
    # Up to 60 products and a tangent near its pole, in float64.
    torch.testing.assert_close(schedule.abar_T, torch.tensor(expected, dtype=torch.float64), rtol=1e-11, atol=0)
    assert float(schedule.abar_T[-1]) == 1.0
    assert bool((schedule.abar_T.diff() > 0).all())


@pytest.mark.parametrize("kind", get_args(ScheduleKind))
@given(chain=chains, data=st.data())
@settings(max_examples=40)
def test_a_local_signal_is_the_product_up_to_its_end(
    kind: ScheduleKind, chain: tuple[int, int], data: st.DataObject
) -> None:
    T, k = chain
    schedule = Schedule.make(kind, T, k)
    ends = data.draw(st.lists(st.sampled_from(schedule.ends), min_size=1, max_size=5))
    steps = [data.draw(st.integers(0, end - 1)) for end in ends]
    expected = [math.prod(alphas(kind, T)[t:end]) for t, end in zip(steps, ends, strict=True)]
    found_B = schedule.signal(torch.tensor(steps), torch.tensor(ends))
    assert found_B.dtype == torch.float32
    # One rounding to float32.
    torch.testing.assert_close(found_B, torch.tensor(expected).float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(schedule.signal(torch.tensor(steps), T), schedule.signal(torch.tensor(steps)))
    assert bool((found_B >= schedule.signal(torch.tensor(steps))).all())


@given(chain=chains)
@settings(max_examples=80)
def test_local_chains_end_evenly_spread_and_the_last_one_at_the_end(chain: tuple[int, int]) -> None:
    T, k = chain
    ends = Schedule.make("cosine", T, k).ends
    assert len(ends) == k
    assert ends[-1] == T
    assert all(0 < before < after for before, after in itertools.pairwise((0.5, *ends)))
    assert all(abs(end - i * T / k) <= 0.5 for i, end in enumerate(ends, start=1))


def test_twenty_steps_and_three_targets_end_at_seven_thirteen_and_twenty() -> None:
    assert Schedule.make("cosine", 20, 3).ends == (7, 13, 20)


@pytest.mark.parametrize("kind", get_args(ScheduleKind))
@given(T=st.integers(2, 400))
@settings(max_examples=40)
def test_the_first_state_of_the_global_chain_is_noise(kind: ScheduleKind, T: int) -> None:
    first = float(Schedule.make(kind, T, 1).abar_T[0])
    # Two steps of the linear schedule have their floor and 0.95.
    assert first <= (SMALLEST_ALPHA if T == 2 else 0.0101)


@given(chain=st.integers(2, 400).flatmap(lambda T: st.tuples(st.just(T), st.integers(1, T))))
@settings(max_examples=60)
def test_the_first_state_of_every_local_cosine_chain_is_noise(chain: tuple[int, int]) -> None:
    schedule = Schedule.make("cosine", *chain)
    worst = max(float(schedule.signal(torch.tensor([0]), end)) for end in schedule.ends)
    # A chain of one step keeps what its floor leaves; the second step takes half of that at least.
    assert worst <= 1.001 * (SMALLEST_ALPHA if schedule.ends[0] == 1 else 0.01)


@given(T=st.integers(9, 400), k=st.integers(1, 3))
@settings(max_examples=60)
def test_the_first_state_of_up_to_three_local_linear_chains_is_noise(T: int, k: int) -> None:
    schedule = Schedule.make("linear", T, k)
    assert max(float(schedule.signal(torch.tensor([0]), end)) for end in schedule.ends) <= 0.01


@given(chain=chains)
@settings(max_examples=60)
def test_sampling_steps_lead_from_start_to_end_without_a_gap(chain: tuple[int, int]) -> None:
    T, num_steps = chain
    steps = Schedule.make("cosine", T, 1).steps(num_steps)
    assert len(steps) == num_steps
    assert (steps[0][0], steps[-1][1]) == (0, T)
    assert all(u == after for (_, u), (after, _) in itertools.pairwise(steps))
    lengths = [u - t for t, u in steps]
    assert min(lengths) >= 1
    # Both stops of a step are rounded.
    assert max(lengths) <= T / num_steps + 1


@pytest.mark.parametrize(
    ("kind", "num_steps", "num_targets", "message"),
    [
        ("cosine", 20, 0, "num_targets=0"),
        ("cosine", 20, 21, "num_targets=21.*num_steps=20"),
        ("linear", 0, 1, "between 1 and"),
    ],
)
def test_no_schedule_has_more_targets_than_steps(
    kind: ScheduleKind, num_steps: int, num_targets: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule.make(kind, num_steps, num_targets)


@pytest.mark.parametrize("num_steps", [0, 21])
def test_no_more_sampling_steps_than_the_chain_has(num_steps: int) -> None:
    with pytest.raises(ValueError, match=rf"sampling\.num_steps={num_steps}.*diffusion\.num_steps=20"):
        Schedule.make("cosine", 20, 3).steps(num_steps)


def test_a_schedule_of_unknown_kind_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="schedule=cosin: give one of cosine, linear; did you mean 'cosine'"):
        load_config(DiffusionConfig, None, ["schedule=cosin"])
