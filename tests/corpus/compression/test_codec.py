"""Networks within a budget of bits: every bit counted, decoded from the code alone, more where weights are large."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from raywgen.benchmarks.rates import rate_report, snr_db
from raywgen.corpus.compression import BudgetError, CodecConfig, NetworkCodec
from raywgen.evaluation.tokenizer_report import DB_PER_BIT
from raywgen.tasks.networks.cifar_resnet import CifarResNet
from raywgen.weights import Layout, NonFiniteWeightsError, StateDict

LARGE = "layer3.0.conv2.weight"


def network(spread: float = 0.0) -> StateDict:
    """A small ResNet whose filters and input channels differ in scale by `spread`, as a standard deviation of logs."""
    torch.manual_seed(0)
    state = CifarResNet(8, widths=(4, 8, 16)).state_dict()
    generator = torch.Generator().manual_seed(1)
    for tensor in state.values():
        if tensor.dim() == 4:
            for shape in ((-1, 1, 1, 1), (1, -1, 1, 1)):
                size = tensor.shape[0] if shape[0] == -1 else tensor.shape[1]
                tensor.mul_(torch.exp(spread * torch.randn(size, generator=generator)).view(shape))
    return state


def codec(**options: Any) -> NetworkCodec:
    settings = {"state_bits": 6, "vector_length": 64, "min_values": 200, "small_bits": 8, "count_equally": "values"}
    return NetworkCodec(CodecConfig(**(settings | options)))


@pytest.mark.parametrize("budget", [3.0, 4.25, 6.0])
@pytest.mark.parametrize("count_equally", ["values", "tensors"])
def test_the_budget_is_kept_and_used(budget: float, count_equally: str) -> None:
    made, state = codec(bits_per_value=budget, count_equally=count_equally), network(0.3)
    coded = made.encode(state)
    rate = rate_report(made, coded, state)
    # Half a vector of each of some five widths is padding, 64 * 12 bits of 6 thousand values, or a width more or less.
    assert budget - 0.15 < rate.bits_per_value <= budget
    decoded = made.decode(coded)
    CifarResNet(8, widths=(4, 8, 16)).load_state_dict(decoded)
    if count_equally == "values":
        # 2^6 states leave 1.2 dB to the bound (more at more bits), scales of filters this small cost 1 dB.
        gap_db = DB_PER_BIT * rate.large_bits_per_value - snr_db(made.large_tensors(coded.layout), state, decoded)
        assert gap_db < 3.5


def test_every_bit_is_counted() -> None:
    made, state = codec(bits_per_value=4.0), network(0.3)
    coded = made.encode(state)
    layout = coded.layout
    large, small = made.large_tensors(layout), made.small_tensors(layout)
    bits = made.bits(coded)
    widths = made._bits_of_kernels(coded)[0]
    sizes = torch.cat([torch.full((s.shape[0] * s.shape[1],), math.prod(s.shape[2:])) for s in large])
    vectors = {k: math.ceil(int(sizes[widths == k].sum()) / 64) for k in range(1, 9)}
    assert sum(vectors.values()) == len(coded.codes_NL)
    assert bits["codes"] == sum(64 * k * num for k, num in vectors.items())
    assert bits["rows"] == 8 * sum(s.shape[0] for s in large) == 8 * len(coded.rows_G)
    assert bits["columns"] == 4 * sum(s.shape[1] for s in large) == 4 * len(coded.columns_I)
    assert bits["small_tensors"] == 8 * sum(s.num_values for s in small) + 32 * len(small)
    assert bits["threshold"] == 16
    assert abs(coded.threshold) < 2**15
    # Each token fits into the bits it is counted with.
    start = 0
    for k, num in vectors.items():
        part = coded.codes_NL[start : start + num]
        assert not len(part) or 0 <= int(part.min()) <= int(part.max()) < 4**k
        start += num
    assert 0 <= int(coded.columns_I.min()) <= int(coded.columns_I.max()) < 16


def test_decoding_is_a_function_of_the_code_alone() -> None:
    coded = codec().encode(network(0.3))
    first, second = codec().decode(coded), codec().decode(coded)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_uneven_scales_are_worth_bits() -> None:
    """Scales with logs of variance s^2 = 2 * 0.5^2 let allocation gain up to 20 log10(e) s^2 = 4.3 dB."""
    state = network(0.5)
    made = codec(bits_per_value=4.0)
    allocated, even = (rate_report(made, made.encode(each), each) for each in (state, network()))
    assert allocated.bits_per_value == pytest.approx(even.bits_per_value, abs=0.15)
    # Columns of scales cost some of it: a third of the bound is asked for.
    assert allocated.snr_db > even.snr_db + 1.4


def test_small_tensors_get_more_bits_where_tensors_count_alike() -> None:
    state = network(0.3)
    layout = Layout.from_state_dict(state)
    gains = {}
    for count_equally in ("values", "tensors"):
        made = codec(count_equally=count_equally, bits_per_value=4.0)
        decoded = made.decode(made.encode(state))
        large = made.large_tensors(layout)
        first, last = (min(large, key=lambda s: s.num_values), max(large, key=lambda s: s.num_values))
        gains[count_equally] = snr_db([first], state, decoded) - snr_db([last], state, decoded)
    # 8 times fewer values ask for 1.5 bits more, 9 dB; whole bits and few filters leave some of it.
    assert gains["tensors"] > gains["values"] + 5


def test_a_dead_filter_stays_dead() -> None:
    state = network(0.3)
    state[LARGE][3] = 0.0
    decoded = codec().decode(codec().encode(state))
    # The smallest scale is 2^-24.
    assert float(decoded[LARGE][3].abs().max()) < 1e-5


def test_running_variances_stay_positive_at_the_fewest_bits() -> None:
    decoded = codec(small_bits=2).decode(codec(small_bits=2).encode(network()))
    for name, tensor in decoded.items():
        if name.endswith("running_var"):
            assert float(tensor.min()) > 0, name


def test_other_statistics_change_nothing_else() -> None:
    made, state = codec(), network()
    coded = made.encode(state)
    other = {name: tensor + 0.5 if "running" in name else tensor for name, tensor in state.items()}
    before, after = made.decode(coded), made.decode(made.with_statistics(coded, other))
    for name, tensor in after.items():
        if "running_mean" in name:
            torch.testing.assert_close(tensor, state[name] + 0.5, rtol=0, atol=0.02)
        elif "running_var" not in name:
            assert torch.equal(tensor, before[name]), name


def test_what_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(BudgetError, match="small_bits"):
        codec(bits_per_value=0.1).encode(network())
    state = network()
    state["linear.bias"][0] = torch.nan
    with pytest.raises(NonFiniteWeightsError, match=r"linear\.bias"):
        codec().encode(state)
    for wrong in ({"vector_length": 100}, {"small_bits": 1}, {"bits_per_value": 0.0}, {"state_bits": 17}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            codec(**wrong)
