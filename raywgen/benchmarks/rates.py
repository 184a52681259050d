"""Rate reports of coded networks: cost, signal to noise, and the distance from the rate-distortion bound.

A memoryless Gaussian of unit variance coded at R bits per value cannot be reproduced with a squared error below
`2^(-2R)`, so that every bit buys at most 6.02 dB (Cover and Thomas 2006, theorem 10.3.2). Errors are taken in units of
each tensor's root mean square, so that all values count equally whatever their tensor's scale; a network whose filters
differ in scale within a tensor is easier than that Gaussian.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from raywgen.corpus.compression import CodedNetwork, NetworkCodec
from raywgen.evaluation.tokenizer_report import DB_PER_BIT
from raywgen.weights import Layout, TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class RateReport:
    """One network through one codec.

    Attributes:
        bits_per_value: All bits of the code over all values of the layout.
        values_per_token: Values of the large tensors over their tokens.
        snr_db: Signal to noise of all values.
        snr_gap_db: Distance of `snr_db` from 6.02 dB per bit, everything counted.
        large_bits_per_value: Tokens, scales and threshold over the values of the large tensors alone.
        nearest_snr_db: Signal to noise of the large tensors rounded to the nearest of `floor(2^large_bits_per_value)`
            levels, with the step that is best for a Gaussian of the tensor's scale.
        nearest_extremes_snr_db: The same with a step that reaches the tensor's extremes.
        codebook_values: Numbers that must be known to decode, beside the code: entries of all trellis tables, which are
            Gaussian quantiles that follow from their size.
    """

    bits_per_value: float
    values_per_token: float
    snr_db: float
    snr_gap_db: float
    large_bits_per_value: float
    nearest_snr_db: float
    nearest_extremes_snr_db: float
    codebook_values: int


def rate_report(codec: NetworkCodec, coded: CodedNetwork, state_dict: Mapping[str, Tensor]) -> RateReport:
    """Measures a code against the network it was made of."""
    layout, decoded = coded.layout, codec.decode(coded)
    large = codec.large_tensors(layout)
    bits = codec.bits(coded)
    num_large = sum(spec.num_values for spec in large)
    large_rate = (sum(bits.values()) - bits["small_tensors"]) / max(1, num_large)
    rate = sum(bits.values()) / layout.num_values
    snr = snr_db([*large, *codec.small_tensors(layout)], state_dict, decoded)
    num_levels = max(2, math.floor(2**large_rate))
    rounded = [round_to_nearest(layout, state_dict, num_levels, best) for best in (True, False)]
    return RateReport(
        bits_per_value=rate,
        values_per_token=num_large / max(1, coded.codes_NL.numel()),
        snr_db=snr,
        snr_gap_db=DB_PER_BIT * rate - snr,
        large_bits_per_value=large_rate,
        nearest_snr_db=snr_db(large, state_dict, rounded[0]),
        nearest_extremes_snr_db=snr_db(large, state_dict, rounded[1]),
        codebook_values=sum(len(trellis.table_Q) for trellis in codec.trellises.values()),
    )


def snr_db(specs: list[TensorSpec], original: Mapping[str, Tensor], decoded: Mapping[str, Tensor]) -> float:
    """Returns `10 log10(number of values / sum of squared errors)`, errors in units of each tensor's rms."""
    noise = 0.0
    for spec in specs:
        value = original[spec.name].double()
        error = (decoded[spec.name].double() - value).square().sum()
        noise += float(error / value.square().mean().clamp(min=1e-30))
    return 10 * math.log10(max(1, sum(spec.num_values for spec in specs)) / max(noise, 1e-30))


def round_to_nearest(
    layout: Layout, state_dict: Mapping[str, Tensor], num_levels: int, is_best: bool
) -> dict[str, Tensor]:
    """Rounds every tensor to an even grid of `num_levels` around 0, clipped at its ends.

    Args:
        layout: Layout of the network.
        state_dict: Its values.
        num_levels: Levels of a value.
        is_best: Whether the step is the best one for a Gaussian of the tensor's scale, or reaches its extremes.
    """
    best_step = gaussian_step(num_levels) if is_best else 0.0
    rounded = {}
    for spec in layout.generated:
        value = state_dict[spec.name].float()
        reach = float(value.abs().max())
        step = best_step * float(value.square().mean().sqrt()) if is_best else 2 * reach / (num_levels - 1)
        half = (num_levels - 1) / 2
        position = torch.round(value / max(step, 1e-30) + half).clamp(0, num_levels - 1)
        rounded[spec.name] = (position - half) * step
    return rounded


def gaussian_step(num_levels: int) -> float:
    """Finds the step of the even grid with the least squared error on a unit Gaussian (Max 1960), of 1000 steps."""
    quantile_X = torch.special.ndtri((torch.arange(4096, dtype=torch.float64) + 0.5) / 4096)
    half = (num_levels - 1) / 2
    steps_S = torch.arange(1, 1001, dtype=torch.float64) * (6.0 / num_levels / 1000)
    position_SX = torch.round(quantile_X / steps_S.unsqueeze(1) + half).clamp(0, num_levels - 1)
    error_S = ((position_SX - half) * steps_S.unsqueeze(1) - quantile_X).square().mean(dim=1)
    return float(steps_S[error_S.argmin()])
