"""Numbers beside the tokens: within half a step, and variances always positive."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raywgen.corpus.compression.scalars import decode_even, decode_scales, encode_even, encode_scales

FINITE = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)


@given(scales=st.lists(st.floats(2.0**-23, 2.0**7), min_size=1, max_size=20))
def test_scales_come_back_within_half_a_step(scales: list[float]) -> None:
    scales_G = torch.tensor(scales, dtype=torch.float64)
    tokens_G = encode_scales(scales_G)
    assert 0 <= int(tokens_G.min()) <= int(tokens_G.max()) < 256
    ratio_G = decode_scales(tokens_G).double() / scales_G
    # Half of an eighth of an octave, and float32's own rounding.
    assert float(ratio_G.log2().abs().max()) <= 1 / 16 + 1e-6


@given(tokens=st.lists(st.integers(0, 255), min_size=1, max_size=20))
def test_scale_tokens_come_back_from_their_scales(tokens: list[int]) -> None:
    tokens_G = torch.tensor(tokens)
    assert torch.equal(encode_scales(decode_scales(tokens_G)), tokens_G)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_scales_out_of_range_become_the_nearest_there_is(scale: float) -> None:
    decoded = float(decode_scales(encode_scales(torch.tensor([scale]))))
    assert decoded == pytest.approx(2.0**-24 if scale < 1 else 2.0 ** (255 / 8 - 24))


@given(values=st.lists(FINITE, min_size=1, max_size=30), bits=st.integers(2, 16))
def test_a_small_tensor_comes_back_within_half_a_step(values: list[float], bits: int) -> None:
    value_X = torch.tensor(values)
    codes_X, ends_2 = encode_even(value_X, bits, is_variance=False)
    assert 0 <= int(codes_X.min()) <= int(codes_X.max()) < 1 << bits
    step = 2 * float(ends_2[1].float()) / ((1 << bits) - 1)
    error_X = (decode_even(codes_X, ends_2, bits, is_variance=False) - value_X).abs()
    # float32 positions on a grid of 2^16 steps add up to one part in 2^8 of a step, and the sum its own rounding.
    assert float(error_X.max()) <= 0.51 * step + 1e-6 * float(value_X.abs().max()) + 1e-12


@given(values=st.lists(st.floats(0.0, 1e6, width=32), min_size=1, max_size=30), bits=st.integers(2, 12))
def test_variances_stay_positive(values: list[float], bits: int) -> None:
    codes_X, ends_2 = encode_even(torch.tensor(values), bits, is_variance=True)
    decoded_X = decode_even(codes_X, ends_2, bits, is_variance=True)
    assert float(decoded_X.min()) > 0
    assert bool(decoded_X.isfinite().all())


def test_variances_keep_their_ratio_over_many_octaves() -> None:
    variance_X = torch.logspace(-4, 4, 50)
    codes_X, ends_2 = encode_even(variance_X, 8, is_variance=True)
    ratio_X = decode_even(codes_X, ends_2, 8, is_variance=True) / variance_X
    # 8 decades in 255 steps: half a step is a factor of 1.037.
    assert float(ratio_X.log().abs().max()) < 0.04
