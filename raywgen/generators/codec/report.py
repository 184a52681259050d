"""What a code costs, what it keeps, and how far it is from the rate-distortion bound.

A memoryless Gaussian of unit variance coded at R bits per value cannot be reproduced with a squared error below
`2^(-2R)`, so that every bit buys at most 6.02 dB (Cover and Thomas 2006, theorem 10.3.2). Errors are taken in units of
each tensor's root mean square, so that all values count alike whatever their tensor's scale; a network whose filters
differ in scale within a tensor is easier than that Gaussian.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from raywgen.generators.codec.network_codec import CodedNetwork, NetworkCodec
from raywgen.weights import Layout, TensorSpec

DB_PER_BIT = 20 * math.log10(2)


@dataclass(frozen=True, slots=True, kw_only=True)
class RateReport:
    """One network through one codec.

    Attributes:
        bits_per_value: All bits of the code over all values of the layout.
        bits_of_parts: Bits of tokens, scales, small tensors and all else.
        values_per_token: Values of the large tensors over their tokens.
        snr_db: Signal to noise of all stored values.
        snr_gap_db: How far `snr_db` is below 6.02 dB per bit, everything counted.
        large_bits_per_value: Tokens, scales and outliers over the values of the large tensors alone.
        large_snr_db: Signal to noise of the large tensors alone.
        large_snr_gap_db: How far that is below 6.02 dB per bit.
        nearest_snr_db: Large tensors rounded to the nearest of `floor(2^large_bits_per_value)` levels, with the step
            that is best for a Gaussian of the tensor's scale.
        nearest_extremes_snr_db: The same with a step that reaches the tensor's extremes.
        codes_used: Part of the codes that occur, over all places of a token in its vector.
        code_perplexity: `2^H` of the codes' shares, mean over places; at most the number of codes.
        codebook_values: Numbers that must be known to decode, beside the code.
        decoder_values: Numbers of a learned decoder: none here.
    """

    bits_per_value: float
    bits_of_parts: dict[str, float]
    values_per_token: float
    snr_db: float
    snr_gap_db: float
    large_bits_per_value: float
    large_snr_db: float
    large_snr_gap_db: float
    nearest_snr_db: float
    nearest_extremes_snr_db: float
    codes_used: float
    code_perplexity: float
    codebook_values: int
    decoder_values: int = 0


def rate_report(codec: NetworkCodec, coded: CodedNetwork, state_dict: Mapping[str, Tensor]) -> RateReport:
    """Measures a code against the network it was made of."""
    layout, decoded = coded.layout, codec.decode(coded)
    large = codec.large_tensors(layout)
    stored = [*large, *codec.small_tensors(layout)]
    bits = codec.bits(coded)
    num_large = sum(spec.num_values for spec in large)
    large_rate = (sum(bits.values()) - bits["small_tensors"]) / max(1, num_large)
    rate = sum(bits.values()) / layout.num_values
    snr, large_snr = (snr_db(specs, state_dict, decoded) for specs in (stored, large))
    num_levels = max(2, math.floor(2**large_rate))
    rounded = [round_to_nearest(layout, state_dict, num_levels, best) for best in (True, False)]
    used, perplexity = code_use(coded.codes_NL, codec.quantiser.num_codes)
    return RateReport(
        bits_per_value=rate,
        bits_of_parts=bits,
        values_per_token=num_large / max(1, coded.codes_NL.numel()),
        snr_db=snr,
        snr_gap_db=DB_PER_BIT * rate - snr,
        large_bits_per_value=large_rate,
        large_snr_db=large_snr,
        large_snr_gap_db=DB_PER_BIT * large_rate - large_snr,
        nearest_snr_db=snr_db(large, state_dict, rounded[0]),
        nearest_extremes_snr_db=snr_db(large, state_dict, rounded[1]),
        codes_used=used,
        code_perplexity=perplexity,
        codebook_values=codec.num_codebook_values,
    )


def snr_db(specs: list[TensorSpec], original: Mapping[str, Tensor], decoded: Mapping[str, Tensor]) -> float:
    """`10 log10(number of values / sum of squared errors)`, errors in units of each tensor's root mean square."""
    noise = 0.0
    for spec in specs:
        value = original[spec.name].double()
        error = (decoded[spec.name].double() - value).square().sum()
        noise += float(error / value.square().mean().clamp(min=1e-30))
    return 10 * math.log10(max(1, sum(spec.num_values for spec in specs)) / max(noise, 1e-30))


def round_to_nearest(
    layout: Layout, state_dict: Mapping[str, Tensor], num_levels: int, is_best: bool
) -> dict[str, Tensor]:
    """Every tensor rounded to an even grid of `num_levels` around 0, clipped at its ends.

    Args:
        layout: Of the network.
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
    """Step of the even grid with the least squared error on a unit Gaussian (Max 1960), by search over 1000 steps."""
    quantile_X = torch.special.ndtri((torch.arange(4096, dtype=torch.float64) + 0.5) / 4096)
    half = (num_levels - 1) / 2
    steps_S = torch.arange(1, 1001, dtype=torch.float64) * (6.0 / num_levels / 1000)
    position_SX = torch.round(quantile_X / steps_S.unsqueeze(1) + half).clamp(0, num_levels - 1)
    error_S = ((position_SX - half) * steps_S.unsqueeze(1) - quantile_X).square().mean(dim=1)
    return float(steps_S[error_S.argmin()])


def code_use(codes_NL: Tensor, num_codes: int) -> tuple[float, float]:
    """Part of the codes that occur, and their perplexity; means over the L places."""
    used, perplexity = [], []
    for codes_N in codes_NL.t():
        counts_V = torch.unique(codes_N, return_counts=True)[1].double()
        share_V = counts_V / counts_V.sum()
        used.append(len(counts_V) / num_codes)
        perplexity.append(float(torch.exp(-(share_V * share_V.log()).sum())))
    return sum(used) / max(1, len(used)), sum(perplexity) / max(1, len(perplexity))
