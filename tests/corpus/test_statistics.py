from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raywgen.corpus.statistics import LayoutStatistics
from raywgen.weights import Layout, StateDict

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def pack(states: list[StateDict]) -> tuple[Layout, Tensor]:
    layout = Layout.from_state_dict(states[0])
    return layout, torch.stack([layout.pack(state) for state in states])


def networks(num: int, dtype: torch.dtype, seed: int, mean: float = 0.0, std: float = 1.0) -> list[StateDict]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "w": (mean + std * torch.randn(7, 5, generator=generator, dtype=torch.float64)).to(dtype),
            "steps": torch.tensor(index),
            "scale": (torch.rand((), generator=generator) * 3).to(dtype),
            "b": (std * torch.randn(3, generator=generator)).float(),
            "none": torch.empty(0, 4),
        }
        for index in range(num)
    ]


def brute_force(states: list[StateDict], name: str) -> tuple[float, float]:
    values = torch.cat([state[name].reshape(-1).double() for state in states])
    return float(values.mean()), float(values.std(correction=0))


@settings(max_examples=60)
@given(
    num=st.integers(1, 6),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
    mean=st.sampled_from([0.0, 1.0, -30.0]),
    std=st.sampled_from([1e-4, 1.0, 50.0]),
)
def test_moments_are_those_of_float64(num: int, dtype: torch.dtype, seed: int, mean: float, std: float) -> None:
    states = networks(num, dtype, seed, mean, std)
    moments = LayoutStatistics.measure(*pack(states)).moments()
    assert sorted(moments) == ["b", "none", "scale", "w"]
    assert moments["none"] == (0.0, 0.0)
    for name in ("w", "scale", "b"):
        expected = brute_force(states, name)
        size = abs(expected[0]) + expected[1]
        assert moments[name][0] == pytest.approx(expected[0], rel=1e-6, abs=1e-7 * size)
        assert moments[name][1] == pytest.approx(expected[1], rel=1e-3, abs=1e-6 * size)


@pytest.mark.parametrize(("mean", "std"), [(5.0, 1e-3), (1.0, 1e-2), (0.0, 1.0)])
def test_a_small_spread_about_a_large_mean_is_not_lost(mean: float, std: float) -> None:
    values = mean + std * torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    found = LayoutStatistics.measure(*pack([{"w": values}])).moments()["w"]
    assert found[0] == pytest.approx(float(values.double().mean()), rel=1e-6, abs=1e-8)
    assert found[1] == pytest.approx(float(values.double().std()), rel=1e-3)


def test_equal_values_have_no_spread() -> None:
    assert LayoutStatistics.measure(*pack([{"w": torch.ones(1000)}] * 3)).moments()["w"] == (1.0, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_whose_squares_overflow_their_dtype_are_measured(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    values = torch.tensor([largest, -largest, largest / 2, 0.0], dtype=dtype)
    mean, std = LayoutStatistics.measure(*pack([{"w": values}])).moments()["w"]
    assert mean == pytest.approx(float(values.double().mean()), rel=1e-6)
    assert std == pytest.approx(float(values.double().std(correction=0)), rel=1e-3)


@settings(max_examples=40)
@given(split=st.integers(1, 7), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**31))
def test_parts_add_up_to_the_whole(split: int, dtype: torch.dtype, seed: int) -> None:
    layout, packed_NP = pack(networks(8, dtype, seed, mean=1.0))
    whole = LayoutStatistics.measure(layout, packed_NP)
    parts = LayoutStatistics.measure(layout, packed_NP[:split]) + LayoutStatistics.measure(layout, packed_NP[split:])
    assert parts.num_checkpoints == whole.num_checkpoints == 8
    for name, (count, total, squares) in whole.sums.items():
        assert parts.sums[name][0] == count
        assert parts.sums[name][1] == pytest.approx(total, rel=1e-9, abs=1e-9)
        assert parts.sums[name][2] == pytest.approx(squares, rel=1e-5)


def test_json_keeps_every_sum() -> None:
    found = LayoutStatistics.measure(*pack(networks(3, torch.float32, 0)))
    assert LayoutStatistics.from_json(found.to_json()) == found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_found_by_checkpoint_and_tensor(dtype: torch.dtype, value: float) -> None:
    states = networks(5, dtype, 0)
    states[1]["w"][3, 2] = value
    states[4]["scale"].fill_(value)
    layout, packed_NP = pack(states)
    found = LayoutStatistics.measure(layout, packed_NP).non_finite(layout, packed_NP)
    assert found == {1: "w", 4: "scale"}


def test_infinities_of_both_signs_do_not_cancel() -> None:
    layout, packed_NP = pack([{"w": torch.tensor([math.inf, -math.inf, 1.0])}, {"w": torch.ones(3)}])
    assert LayoutStatistics.measure(layout, packed_NP).non_finite(layout, packed_NP) == {0: "w"}


def test_finite_checkpoints_are_left_alone_however_large() -> None:
    layout, packed_NP = pack([{"w": torch.full((4,), torch.finfo(torch.float64).max, dtype=torch.float64)}])
    assert LayoutStatistics.measure(layout, packed_NP).non_finite(layout, packed_NP) == {}
