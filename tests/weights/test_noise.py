"""Keyed noise: the same for a sample wherever it is drawn, and distributed as its name says.

Shape legend: B samples. Each distribution test draws 200 000 values with a fixed seed; a Kolmogorov-Smirnov
statistic above 2.0 / sqrt(n) has a chance below 1e-3.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raywgen.weights import KeyedNoise
from raywgen.weights.noise import _mix, _mix_int

NUM_SAMPLES, NUM_VALUES = 400, 500
KS_LIMIT = 2.0 / math.sqrt(NUM_SAMPLES * NUM_VALUES)
KINDS = ("uniform", "normal", "gumbel", "integers")
CDFS = {
    "uniform": lambda x: x,
    "normal": lambda x: 0.5 * torch.erfc(-x / math.sqrt(2.0)),
    "gumbel": lambda x: torch.exp(-torch.exp(-x)),
}


def draw(noise: KeyedNoise, kind: str, *shape: int) -> Tensor:
    return noise.integers(1000, *shape) if kind == "integers" else getattr(noise, kind)(*shape)


@given(
    index=st.lists(st.integers(0, 2**40), min_size=1, max_size=12),
    seed=st.integers(-(2**31), 2**31),
    kind=st.sampled_from(KINDS),
    data=st.data(),
)
@settings(max_examples=80)
def test_a_sample_draws_the_same_in_any_batch_and_order(index: list[int], seed: int, kind: str, data) -> None:
    index_B = torch.tensor(index)
    whole = draw(KeyedNoise(seed, index_B), kind, 3, 2)
    order = torch.tensor(data.draw(st.permutations(range(len(index)))))
    split = data.draw(st.integers(0, len(index)))
    parts = [draw(KeyedNoise(seed, part_B), kind, 3, 2) for part_B in (index_B[order][:split], index_B[order][split:])]
    assert torch.equal(torch.cat(parts), whole[order])


@pytest.mark.parametrize("kind", KINDS)
def test_bit_equal_across_repeats_while_draws_differ(kind: str) -> None:
    first, second = (KeyedNoise(7, torch.arange(50), stream=2) for _ in range(2))
    draws = [draw(first, kind, 20) for _ in range(3)]
    assert all(torch.equal(expected, draw(second, kind, 20)) for expected in draws)
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[1], draws[2])


@pytest.mark.parametrize(
    ("seed", "stream", "offset"), [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 2**33), (-1, 0, 0), (0, 2**31, 0)]
)
def test_other_seeds_streams_and_samples_are_uncorrelated(seed: int, stream: int, offset: int) -> None:
    index_B = torch.arange(NUM_SAMPLES)
    base = KeyedNoise(0, index_B).normal(NUM_VALUES)
    other = KeyedNoise(seed, index_B + offset, stream).normal(NUM_VALUES)
    # The mean of n products of independent normals has standard deviation 1 / sqrt(n); four of them.
    assert abs((base * other).mean().item()) < 4 / math.sqrt(base.numel())


def test_neighbouring_samples_values_and_draws_are_uncorrelated() -> None:
    noise = KeyedNoise(3, torch.arange(NUM_SAMPLES))
    first, second = noise.normal(NUM_VALUES), noise.normal(NUM_VALUES)
    limit = 4 / math.sqrt(first.numel())
    assert abs((first[1:] * first[:-1]).mean().item()) < limit
    assert abs((first[:, 1:] * first[:, :-1]).mean().item()) < limit
    assert abs((first * second).mean().item()) < limit


@pytest.mark.parametrize("kind", CDFS)
def test_values_follow_their_distribution(kind: str) -> None:
    values = draw(KeyedNoise(11, torch.arange(NUM_SAMPLES)), kind, NUM_VALUES).double().flatten().sort().values
    cdf = CDFS[kind](values)
    steps = torch.arange(len(values) + 1, dtype=torch.float64) / len(values)
    distance = torch.maximum((cdf - steps[:-1]).abs().max(), (cdf - steps[1:]).abs().max())
    assert distance.item() < KS_LIMIT


@pytest.mark.parametrize(
    ("kind", "mean", "variance", "spread"),
    # `spread` is the standard deviation of one squared deviation, which gives the variance's tolerance.
    [
        ("uniform", 0.5, 1 / 12, 0.075),
        ("normal", 0.0, 1.0, math.sqrt(2)),
        ("gumbel", 0.5772157, math.pi**2 / 6, 3.5),
    ],
)
def test_moments(kind: str, mean: float, variance: float, spread: float) -> None:
    values = draw(KeyedNoise(5, torch.arange(NUM_SAMPLES)), kind, NUM_VALUES).double()
    assert values.mean().item() == pytest.approx(mean, abs=4 * math.sqrt(variance / values.numel()))
    assert values.var().item() == pytest.approx(variance, abs=4 * spread / math.sqrt(values.numel()))


@pytest.mark.parametrize("high", [1, 2, 7, 256, 1000])
def test_integers_take_every_value_equally_often(high: int) -> None:
    values = KeyedNoise(2, torch.arange(NUM_SAMPLES)).integers(high, NUM_VALUES)
    counts = torch.bincount(values.flatten(), minlength=high).double()
    assert len(counts) == high
    expected = values.numel() / high
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    # Mean high - 1, variance 2 (high - 1); four standard deviations.
    assert chi_square <= high - 1 + 4 * math.sqrt(2 * max(1, high - 1))


@pytest.mark.parametrize("high", [2**24, 19_020_000, 2**32, 2**38])
def test_integers_of_a_wide_range_are_odd_as_often_as_even(high: int) -> None:
    """A ViT-L has 19 million chunks of 16 values: more than a single draw tells apart."""
    values = KeyedNoise(0, torch.arange(NUM_SAMPLES)).integers(high, NUM_VALUES)
    assert 0 <= int(values.min()) < high // 100
    assert high - high // 100 < int(values.max()) < high
    assert (values % 2).double().mean().item() == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(values.numel()))


def test_uniform_never_reaches_its_ends_so_that_all_noise_is_finite() -> None:
    index_B = torch.arange(4_000)
    values = KeyedNoise(0, index_B).uniform(1_000)
    assert float(values.min()) > 0.0
    assert float(values.max()) < 1.0
    assert bool(torch.isfinite(KeyedNoise(0, index_B).normal(1_000)).all())
    assert bool(torch.isfinite(KeyedNoise(0, index_B).gumbel(1_000)).all())


@pytest.mark.parametrize(("num_samples", "shape"), [(3, ()), (3, (0,)), (0, (4,)), (0, (0,)), (2, (3, 0, 2))])
def test_shapes_of_scalars_and_of_nothing(num_samples: int, shape: tuple[int, ...]) -> None:
    for kind in KINDS:
        assert draw(KeyedNoise(0, torch.arange(num_samples)), kind, *shape).shape == (num_samples, *shape)


def test_bits_are_those_of_splitmix64() -> None:
    """Against plain integers: the hash is the published finaliser, so that any reader can redo it."""
    mask = 2**64 - 1

    def mix(state: int) -> int:
        state = (state + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        return state ^ (state >> 31)

    seed, sample, stream = -5, 123_456_789_012, 3
    key = mix(mix(sample + mix(seed)) + mix(stream))
    expected = [mix(mix(key + 1_000_003) + index * 0x9E3779B97F4A7C15) >> 40 for index in range(100)]
    assert KeyedNoise(seed, torch.tensor([sample]), stream).integers(2**24, 100)[0].tolist() == expected


def test_a_part_draws_the_same_whichever_parts_are_drawn_beside_it() -> None:
    samples = torch.arange(5)

    def whole() -> KeyedNoise:
        noise = KeyedNoise(3, samples)
        noise.uniform(2)
        return noise

    parts = whole().split(torch.arange(4)).uniform(6).view(5, 4, 6)
    assert torch.equal(parts[:, 0], whole().uniform(6))
    assert torch.equal(parts[:, 2:], whole().split(torch.tensor([2, 3])).uniform(6).view(5, 2, 6))
    assert torch.equal(parts[:2].flatten(0, 1), whole().first(2).split(torch.arange(4)).uniform(6))
    assert len(set(parts.flatten(0, 1)[:, 0].tolist())) == 20


def test_parts_of_parts_and_other_streams_are_others() -> None:
    noise = KeyedNoise(3, torch.arange(50))
    index = torch.arange(1, 9)
    kinds = {
        "parts": noise.split(index),
        "parts of another stream": noise.split(index, stream=1),
        "parts of parts": noise.split(torch.ones(1, dtype=torch.int64), stream=1).split(index),
        "parts of other parts": noise.split(torch.full((1,), 2), stream=1).split(index),
    }
    values = {name: set(kind.uniform(1).flatten().tolist()) for name, kind in kinds.items()}
    # 24 bits of 400 numbers each: two of 1600 numbers agree by chance about once in thirteen.
    assert len(set.union(*values.values())) >= 4 * 400 - 2


def test_parts_are_uncorrelated() -> None:
    parts = KeyedNoise(0, torch.arange(20_000)).split(torch.arange(4)).uniform(1).view(-1, 4)
    correlation = torch.corrcoef(parts.T) - torch.eye(4)
    # Four standard deviations of 1 / sqrt(20 000).
    assert float(correlation.abs().max()) < 0.029


@given(st.integers(-(2**63), 2**63 - 1))
def test_a_number_is_mixed_as_a_tensor_is(value: int) -> None:
    assert _mix_int(value) == int(_mix(torch.tensor(value)))


@given(numbers=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=20))
def test_few_numbers_are_mixed_as_many_are(numbers: list[int]) -> None:
    few = torch.tensor(numbers)
    many = few.repeat(1 + (1 << 16))
    assert many.numel() > 1 << 16
    assert torch.equal(_mix(many)[: len(few)], _mix(few))
    assert torch.equal(_mix(few[0]), _mix(few)[0])


@pytest.mark.parametrize(("num", "shape"), [(1, (3,)), (7, (2, 5)), (5, (1, 9000)), (3, (40000,)), (0, (4,))])
def test_many_draws_are_those_of_many_calls(num: int, shape: tuple[int, ...]) -> None:
    """Several at once, some of 65,536 numbers together, and each by itself."""
    one, other = (KeyedNoise(3, torch.arange(2), stream=1) for _ in range(2))
    expected = [one.gumbel(*shape) for _ in range(num)]
    found = list(other.gumbels(num, *shape))
    assert len(found) == num
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(one.uniform(3), other.uniform(3))
