"""Rates and errors by hand, and published steps of even grids."""

from __future__ import annotations

import math

import pytest
import torch

from raywgen.benchmarks.rates import gaussian_step, rate_report, round_to_nearest, snr_db
from raywgen.corpus.compression import CodecConfig, NetworkCodec
from raywgen.tasks.networks.cifar_resnet import CifarResNet
from raywgen.weights import Layout


def test_the_report_adds_up() -> None:
    torch.manual_seed(0)
    state = CifarResNet(8, widths=(4, 8, 16)).state_dict()
    codec = NetworkCodec(CodecConfig(state_bits=6, vector_length=64, min_values=200, bits_per_value=4.0))
    coded = codec.encode(state)
    report, bits = rate_report(codec, coded, state), codec.bits(coded)
    assert report.bits_per_value == pytest.approx(sum(bits.values()) / coded.layout.num_values)
    assert report.snr_gap_db == pytest.approx(20 * math.log10(2) * report.bits_per_value - report.snr_db)
    num_large = sum(spec.num_values for spec in codec.large_tensors(coded.layout))
    large_bits = bits["codes"] + bits["rows"] + bits["columns"] + bits["threshold"]
    assert report.large_bits_per_value == pytest.approx(large_bits / num_large)
    assert report.values_per_token == pytest.approx(num_large / coded.codes_NL.numel())
    assert report.snr_db > report.nearest_snr_db > report.nearest_extremes_snr_db
    assert report.codebook_values == sum(2 ** max(6, 2 * width) for width in range(1, 9))


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
