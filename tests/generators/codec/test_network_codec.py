"""Whole networks to tokens and back: nothing beside the layout, every bit counted, close to the bound."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from raywgen.generators.codec import CodecConfig, NetworkCodec, rate_report
from raywgen.generators.codec.report import code_use, gaussian_step, round_to_nearest, snr_db
from raywgen.nn.quantisers import FiniteScalarConfig, QuantiserConfig, ResidualConfig, TrellisConfig
from raywgen.tasks.networks.cifar_resnet import CifarResNet
from raywgen.weights import Layout, NonFiniteWeightsError, StateDict

QUANTISERS = {
    "residual": QuantiserConfig(kind="residual", residual=ResidualConfig(num_levels=4, num_codes=16, beam=4)),
    "finite_scalar": QuantiserConfig(kind="finite_scalar", finite_scalar=FiniteScalarConfig(num_levels=4)),
    "trellis": QuantiserConfig(kind="trellis", trellis=TrellisConfig(bits=2, state_bits=6)),
}
LENGTHS = {"residual": 8, "finite_scalar": 64, "trellis": 64}


def network(seed: int = 0) -> StateDict:
    torch.manual_seed(seed)
    state = CifarResNet(8, widths=(4, 8, 16)).state_dict()
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in state.items():
        if "running_var" in name:
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 3 + 0.01)
    return state


def codec(kind: str = "trellis", **options: Any) -> NetworkCodec:
    made = NetworkCodec(CodecConfig(quantiser=QUANTISERS[kind], vector_length=LENGTHS[kind], small=200, **options))
    if kind == "residual":
        made.fit({"first": network(1), "second": network(2)}, num_iterations=3)
    return made


def tensors(coded: Any) -> dict[str, Tensor]:
    return {f.name: getattr(coded, f.name) for f in fields(coded) if isinstance(getattr(coded, f.name), Tensor)}


@pytest.mark.parametrize("kind", sorted(QUANTISERS))
@pytest.mark.parametrize("scale_per", ["tensor", "filter"])
@pytest.mark.parametrize("rotate", [False, True])
def test_a_network_comes_back_with_its_layout_and_most_of_its_power(kind: str, scale_per: str, rotate: bool) -> None:
    made, state = codec(kind, scale_per=scale_per, rotate=rotate), network()
    decoded = made.decode(made.encode(state))
    Layout.from_state_dict(state).check(decoded)
    # 2 bits a value: the bound is 12.04 dB, the best scalar quantiser of a Gaussian has 9.30.
    assert snr_db(made.large_tensors(Layout.from_state_dict(state)), state, decoded) > 8.5
    CifarResNet(8, widths=(4, 8, 16)).load_state_dict(decoded)


def test_decoding_is_a_function_of_the_code_alone() -> None:
    state = network()
    coded = codec().encode(state)
    first, second = codec().decode(coded), codec().decode(coded)
    assert all(torch.equal(first[name], second[name]) for name in state)


def test_every_bit_is_counted() -> None:
    made, state = codec(outliers=0.01), network()
    coded = made.encode(state)
    layout = coded.layout
    large = made.large_tensors(layout)
    num_large = sum(spec.num_values for spec in large)
    small = made.small_tensors(layout)
    assert num_large + sum(spec.num_values for spec in small) == layout.num_values
    assert made.bits(coded) == {
        "codes": math.ceil(num_large / 64) * 64 * 2,
        "scales": 8 * sum(spec.shape[0] for spec in large),
        "small_tensors": 8 * sum(spec.num_values for spec in small) + 32 * len(small),
        "outliers": round(0.01 * num_large) * (16 + math.ceil(math.log2(num_large))),
    }
    # Each part of the code holds what it is counted for, and there is nothing else in it.
    found = {name: tensor.numel() for name, tensor in tensors(coded).items()}
    assert found == {
        "codes_NL": math.ceil(num_large / 64) * 32,
        "scales_G": sum(spec.shape[0] for spec in large),
        "small_F": sum(spec.num_values for spec in small),
        "ends_T2": 2 * len(small),
        "outliers_O": round(0.01 * num_large),
        "outlier_values_O": round(0.01 * num_large),
    }
    assert coded.ends_T2.dtype == torch.bfloat16
    assert coded.outlier_values_O.dtype == torch.float16


def test_running_variances_stay_positive_at_the_fewest_bits() -> None:
    state = network()
    decoded = codec(small_bits=2).decode(codec(small_bits=2).encode(state))
    for name, tensor in decoded.items():
        if name.endswith("running_var"):
            assert float(tensor.min()) > 0, name


def test_statistics_that_are_reestimated_cost_nothing() -> None:
    stored, left_out, state = codec(), codec(statistics="reestimated"), network()
    coded = left_out.encode(state)
    num_statistics = sum(state[name].numel() for name in state if "running" in name)
    assert len(stored.encode(state).small_F) - len(coded.small_F) == num_statistics
    decoded = left_out.decode(coded)
    for name, tensor in decoded.items():
        if "running" in name:
            assert torch.equal(tensor, torch.full_like(tensor, float(name.endswith("var")))), name


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


def test_outliers_are_kept() -> None:
    state = network()
    state["layer3.0.conv2.weight"][0, 0, 0, 0] = 30.0
    for scale_per in ("tensor", "filter"):
        made = codec(outliers=0.001, scale_per=scale_per, rotate=False)
        decoded = made.decode(made.encode(state))
        # float16 units of an 8-bit scale.
        assert float(decoded["layer3.0.conv2.weight"][0, 0, 0, 0]) == pytest.approx(30.0, rel=1e-3)


def test_rotation_helps_where_tails_are_heavy() -> None:
    state = network()
    generator = torch.Generator().manual_seed(0)
    for tensor in state.values():
        if tensor.dim() == 4:
            tensor.copy_(tensor * torch.exp(1.2 * torch.randn(tensor.shape, generator=generator)))
    large = codec().large_tensors(Layout.from_state_dict(state))
    snrs = [
        snr_db(large, state, codec(rotate=rotate).decode(codec(rotate=rotate).encode(state)))
        for rotate in (False, True)
    ]
    assert snrs[1] > snrs[0] + 1.0


def test_padding_is_masked_out_where_vectors_are_not_rotated() -> None:
    made = codec("residual", rotate=False)
    vectors_NK, mask_NK, *_ = made._vectors(Layout.from_state_dict(network()), network())
    num_large = sum(spec.num_values for spec in made.large_tensors(Layout.from_state_dict(network())))
    assert int(mask_NK.sum()) == num_large
    assert float((vectors_NK * (1 - mask_NK)).abs().sum()) == 0.0


def test_the_report_adds_up() -> None:
    made, state = codec(), network()
    coded = made.encode(state)
    report = rate_report(made, coded, state)
    layout = coded.layout
    assert report.bits_per_value == pytest.approx(sum(report.bits_of_parts.values()) / layout.num_values)
    assert report.snr_gap_db == pytest.approx(20 * math.log10(2) * report.bits_per_value - report.snr_db)
    num_large = sum(spec.num_values for spec in made.large_tensors(layout))
    large_bits = report.bits_of_parts["codes"] + report.bits_of_parts["scales"]
    assert report.large_bits_per_value == pytest.approx(large_bits / num_large)
    assert report.values_per_token == pytest.approx(num_large / coded.codes_NL.numel())
    assert report.large_snr_gap_db < 2.6
    assert report.large_snr_db > report.nearest_snr_db
    assert 0 < report.codes_used <= 1
    assert 1 <= report.code_perplexity <= made.quantiser.num_codes
    assert report.codebook_values == 64
    assert report.decoder_values == 0


def test_signal_to_noise_in_units_of_each_tensor() -> None:
    state = {"a": torch.tensor([1.0, -1.0]), "b": torch.tensor([200.0, 0.0, 0.0, 0.0])}
    decoded = {"a": torch.tensor([1.1, -1.0]), "b": torch.tensor([210.0, 0.0, 0.0, 0.0])}
    # Both have a root mean square, of 1 and of 100: errors of 0.1 units twice, over six values.
    specs = list(Layout.from_state_dict(state).generated)
    assert snr_db(specs, state, decoded) == pytest.approx(10 * math.log10(6 / 0.02), abs=1e-4)


@pytest.mark.parametrize(("num_levels", "step"), [(2, 1.596), (4, 0.9957), (8, 0.5860), (16, 0.3352)])
def test_the_best_even_step_is_the_published_one(num_levels: int, step: float) -> None:
    # Max 1960, table II.
    assert gaussian_step(num_levels) == pytest.approx(step, abs=0.01)


def test_rounding_to_extremes_keeps_them() -> None:
    state = {"a": torch.tensor([-4.0, 0.5, 3.9, 4.0])}
    rounded = round_to_nearest(Layout.from_state_dict(state), state, 5, is_best=False)
    assert rounded["a"].tolist() == [-4.0, 0.0, 4.0, 4.0]


def test_use_of_codes_by_hand() -> None:
    codes_NL = torch.tensor([[0, 5], [0, 6], [1, 5], [1, 6]])
    assert code_use(codes_NL, 8) == pytest.approx((0.25, 2.0))
    assert code_use(torch.zeros(4, 1, dtype=torch.int64), 8) == pytest.approx((0.125, 1.0))


def test_damaged_networks_and_settings_are_refused_by_name() -> None:
    state = network()
    state["linear.bias"][0] = torch.nan
    with pytest.raises(NonFiniteWeightsError, match=r"linear\.bias"):
        codec().encode(state)
    with pytest.raises(ValueError, match="scale_per=row"):
        CodecConfig(scale_per="row")
    with pytest.raises(ValueError, match="power of two"):
        CodecConfig(vector_length=100)
    with pytest.raises(ValueError, match="small_bits=1"):
        CodecConfig(small_bits=1)
