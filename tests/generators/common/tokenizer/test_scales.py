"""Scales as numbers: there and back, the closed loop, padding, units that the layout alone gives.

Shape legend: B networks, M chunks, K values of a chunk, G groups, X numbers.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from raywgen.generators.common.tokenizer import Tokenizer, TokenizerConfig
from raywgen.generators.common.tokenizer.config import Scales
from raywgen.generators.common.tokenizer.scales import scaled_chunks
from raywgen.generators.common.tokenizer.stage import masked_reconstruction_loss
from raywgen.nn.quantisers import QuantiserConfig
from raywgen.weights import Layout, layout_normalizer
from raywgen.weights.chunks import position_features
from raywgen.weights.groups import Groups, groups_of
from raywgen.weights.tensors import KINDS

pytestmark = pytest.mark.usefixtures("one_thread")
MODES: tuple[Scales, ...] = ("tensor", "filter")
CONVOLUTIONAL = Layout.from_state_dict(
    nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(20, 3)).state_dict()
)


def drawn(num: int, seed: int, spread: float = 2.0) -> Tensor:
    """Networks of the convolutional layout in its units: tensors of sizes `e^(spread * normal)` about such means."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for spec in CONVOLUTIONAL.generated:
        size_B1, mean_B1 = torch.randn(2, num, 1, generator=generator)
        part_BX = torch.randn(num, spec.num_values, generator=generator) * (spread * size_B1).exp()
        parts.append(part_BX + mean_B1 * (len(spec.shape) < 2))
    return torch.cat(parts, dim=1)


@torch.no_grad()
def tokenizer_of(mode: Scales) -> Tokenizer:
    """With k-means codebooks of drawn networks."""
    tokenizer = Tokenizer(
        TokenizerConfig(chunk_length=8, quantiser=QuantiserConfig(num_levels=2, num_codes=16), width=16, scales=mode)
    ).eval()
    normalizer = layout_normalizer(CONVOLUTIONAL)
    chunks_BMK = tokenizer.chunks(normalizer.denormalise(drawn(40, 1)), CONVOLUTIONAL, normalizer, by_code=False)
    tokenizer.quantiser.initialise(chunks_BMK.flatten(0, 1), 5, torch.Generator().manual_seed(0))
    return tokenizer


def within_groups(error_BD: Tensor, values_BD: Tensor, mode: Scales) -> float:
    """The largest error in units of its group's root mean square."""
    groups = groups_of(CONVOLUTIONAL, mode)
    parts = [
        part.unflatten(1, rows) for part, rows in zip(values_BD.split(sizes_of(groups), 1), groups.rows, strict=True)
    ]
    sizes_BG = torch.cat([part_BRX.square().mean(dim=-1).sqrt() for part_BRX in parts], dim=1)
    return float((error_BD.detach() / groups.over_values(sizes_BG)).abs().max())


def sizes_of(groups: Groups) -> list[int]:
    return [num * size for num, size in groups.rows]


@given(seed=st.integers(0, 999), mode=st.sampled_from(MODES), chunk_length=st.sampled_from([3, 8, 64]))
@settings(max_examples=30)
def test_there_and_back_is_the_same(seed: int, mode: Scales, chunk_length: int) -> None:
    scaled, values_BD = scaled_chunks(CONVOLUTIONAL, mode, chunk_length), drawn(3, seed)
    chunks_BMK = scaled.encode(values_BD, lambda header_BMK, part: header_BMK)
    assert chunks_BMK.shape == (3, *scaled.mask_MK.shape)
    # A mean of many sizes is subtracted and added; asinh, sinh, log and exp cost a few ulps more.
    assert within_groups(scaled.decode(chunks_BMK) - values_BD, values_BD, mode) < 1e-4


@given(seed=st.integers(0, 999), mode=st.sampled_from(MODES), noise=st.floats(0, 0.5))
@settings(max_examples=30)
def test_an_error_in_the_scales_code_is_none_in_the_weights(seed: int, mode: Scales, noise: float) -> None:
    scaled, values_BD = scaled_chunks(CONVOLUTIONAL, mode, 8), drawn(3, seed, spread=1.0)
    generator = torch.Generator().manual_seed(seed)

    def kept(header_BMK: Tensor, index_M: Tensor) -> Tensor:
        written.append(header_BMK + noise * torch.randn(header_BMK.shape, generator=generator))
        return written[-1]

    written: list[Tensor] = []
    closed_BMK = scaled.encode(values_BD, kept)
    means, scales = written  # Scales are written once means are known.
    first = groups_of(CONVOLUTIONAL, mode).num_mean_chunks(8)
    header_BMK = torch.cat([means[:, :first], scales[:, first:]], dim=1)
    closed_BMK[:, : scaled.num_header_chunks] = header_BMK
    assert within_groups(scaled.decode(closed_BMK) - values_BD, values_BD, mode) < 1e-4
    # Without the loop the same error is that of the weights.
    open_BMK = scaled.encode(values_BD, lambda header_BMK, part: header_BMK)
    open_BMK[:, : scaled.num_header_chunks] = header_BMK
    if noise > 0.1:
        assert within_groups(scaled.decode(open_BMK) - values_BD, values_BD, mode) > 0.05


@pytest.mark.parametrize("mode", MODES)
def test_weights_are_wrong_by_what_the_values_code_loses_alone(mode: Scales) -> None:
    tokenizer, normalizer = tokenizer_of(mode), layout_normalizer(CONVOLUTIONAL)
    values_BD = drawn(4, 2)
    chunks_BMK = tokenizer.chunks(normalizer.denormalise(values_BD), CONVOLUTIONAL, normalizer)
    positions_MG, mask_MK = tokenizer.positions(CONVOLUTIONAL), tokenizer.mask(CONVOLUTIONAL)
    decoded_BMK = tokenizer.decode(tokenizer.encode(chunks_BMK, positions_MG, mask_MK), positions_MG)
    back_BD = normalizer.normalise(tokenizer.values(decoded_BMK, CONVOLUTIONAL, normalizer))
    first = tokenizer.num_header_chunks(CONVOLUTIONAL)
    lead_BMK = decoded_BMK[:, :first]
    assert float(((lead_BMK.detach() - chunks_BMK[:, :first]) * mask_MK[:first]).abs().max()) > 0.1
    # Values with no loss of their own come back under the same coded scales.
    exact_BMK = torch.cat([lead_BMK, chunks_BMK[:, first:]], dim=1)
    exact_BD = normalizer.normalise(tokenizer.values(exact_BMK, CONVOLUTIONAL, normalizer))
    assert within_groups(exact_BD - values_BD, values_BD, mode) < 1e-3
    assert within_groups(back_BD - values_BD, values_BD, mode) > 0.1


@given(seed=st.integers(0, 9999), mode=st.sampled_from(MODES), size=st.floats(0.1, 1e6))
@settings(max_examples=40)
def test_running_variances_stay_positive_whatever_is_written(seed: int, mode: Scales, size: float) -> None:
    tokenizer = Tokenizer(
        TokenizerConfig(chunk_length=8, quantiser=QuantiserConfig(num_levels=2, num_codes=8), width=8, scales=mode)
    )
    shape = (2, *tokenizer.mask(CONVOLUTIONAL).shape)
    chunks_BMK = size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    chunks_BMK.requires_grad_()
    values_BD = tokenizer.values(chunks_BMK, CONVOLUTIONAL, layout_normalizer(CONVOLUTIONAL))
    assert bool((CONVOLUTIONAL.unflatten(values_BD)["1.running_var"] > 0).all())
    assert bool(values_BD.isfinite().all())
    values_BD.sum().backward()
    assert chunks_BMK.grad is not None
    assert bool(chunks_BMK.grad.isfinite().all())


@pytest.mark.parametrize(("mode", "num_scales"), [("tensor", 8), ("filter", 5 + 3 + 6)])
def test_bits_of_scales_are_counted(mode: Scales, num_scales: int) -> None:
    tokenizer = tokenizer_of(mode)
    num_chunks = math.ceil(6 / 8) + math.ceil(num_scales / 8) + math.ceil(CONVOLUTIONAL.num_values / 8)
    codes_BML = tokenizer.encode(
        torch.zeros(1, num_chunks, 8), tokenizer.positions(CONVOLUTIONAL), tokenizer.mask(CONVOLUTIONAL)
    )
    assert codes_BML.shape == (1, num_chunks, 2)
    assert tokenizer.quantiser.num_tokens * 4 * num_chunks == pytest.approx(codes_BML.numel() * 4)
    assert tokenizer.mask(CONVOLUTIONAL).sum() == 6 + num_scales + CONVOLUTIONAL.num_values


@pytest.mark.parametrize("mode", MODES)
def test_padding_has_no_say(mode: Scales) -> None:
    tokenizer, normalizer = tokenizer_of(mode), layout_normalizer(CONVOLUTIONAL)
    chunks_BMK = tokenizer.chunks(normalizer.denormalise(drawn(4, 3)), CONVOLUTIONAL, normalizer)
    positions_MG, mask_MK = tokenizer.positions(CONVOLUTIONAL), tokenizer.mask(CONVOLUTIONAL)
    is_padding_MK = mask_MK == 0
    assert bool(is_padding_MK[: tokenizer.num_header_chunks(CONVOLUTIONAL)].any())
    codes_BML = tokenizer.encode(chunks_BMK, positions_MG, mask_MK)
    garbage_BMK = torch.where(is_padding_MK, torch.tensor(1e3), chunks_BMK)
    # An untrained encoder passes chunks on, so that garbage would reach the codes.
    assert torch.equal(tokenizer.encode(garbage_BMK, positions_MG, mask_MK), codes_BML)
    decoded_BMK = tokenizer.decode(codes_BML, positions_MG)
    spoilt_BMK = torch.where(is_padding_MK, torch.tensor(1e3), decoded_BMK)
    for back_BMK in (decoded_BMK, spoilt_BMK):
        assert torch.equal(
            tokenizer.values(back_BMK, CONVOLUTIONAL, normalizer),
            tokenizer.values(decoded_BMK, CONVOLUTIONAL, normalizer),
        )
    assert torch.equal(
        masked_reconstruction_loss(chunks_BMK, decoded_BMK, mask_MK),
        masked_reconstruction_loss(garbage_BMK, spoilt_BMK, mask_MK),
    )


@pytest.mark.parametrize("mode", MODES)
def test_position_features_say_what_header_chunks_hold(mode: Scales) -> None:
    tokenizer = tokenizer_of(mode)
    positions_MG, first = tokenizer.positions(CONVOLUTIONAL), tokenizer.num_header_chunks(CONVOLUTIONAL)
    assert positions_MG.shape == (len(tokenizer.mask(CONVOLUTIONAL)), tokenizer.num_position_features)
    assert positions_MG[:, -2].tolist() == [1.0] + [0.0] * (len(positions_MG) - 1)
    assert positions_MG[:, -1].tolist() == [0.0] + [1.0] * (first - 1) + [0.0] * (len(positions_MG) - first)
    assert torch.equal(positions_MG[first:, :-2], position_features(CONVOLUTIONAL, 8))
    assert len(torch.unique(positions_MG, dim=0)) == len(positions_MG)
    # Scales begin with the weights', means with the biases'.
    kinds = positions_MG[:first, : len(KINDS)].argmax(dim=1)
    assert [KINDS[kind] for kind in kinds[:2]] == ["bias", "weight"]
    again = Layout.from_json(CONVOLUTIONAL.to_json())
    assert torch.equal(tokenizer.positions(again), positions_MG)


def test_like_tensors_stand_side_by_side() -> None:
    numbers_BX = torch.arange(8.0).unsqueeze(0)
    groups = groups_of(CONVOLUTIONAL, "tensor")
    values_BD = groups.over_values((numbers_BX - 3).sinh().exp())
    for group in groups.with_mean:
        values_BD[:, groups.of_values(torch.arange(CONVOLUTIONAL.num_values)) == group] = 0.0
    chunks_BMK = scaled_chunks(CONVOLUTIONAL, "tensor", 8).encode(values_BD, lambda chunks_BMK, part: chunks_BMK)
    # In the layout: weight, bias, norm scale, shift, mean, variance, weight, bias; of constant vectors nothing is left.
    assert chunks_BMK[0, 1].tolist() == pytest.approx([-6, 6, -6, -6, -6, -6, -6, -6], abs=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_a_larger_tensor_changes_its_scale_alone(mode: Scales) -> None:
    tokenizer, normalizer = tokenizer_of(mode), layout_normalizer(CONVOLUTIONAL)
    values_BD = normalizer.denormalise(drawn(2, 4, spread=0.3))
    larger_BD = values_BD.clone()
    larger_BD[:, :90] *= 1.5
    first = tokenizer.num_header_chunks(CONVOLUTIONAL)
    one_BMK, other_BMK = (
        tokenizer.chunks(each_BD, CONVOLUTIONAL, normalizer, by_code=False) for each_BD in (values_BD, larger_BD)
    )
    torch.testing.assert_close(one_BMK[:, first:], other_BMK[:, first:], rtol=1e-4, atol=1e-5)
    moved_BX = ((other_BMK / 2).sinh() - (one_BMK / 2).sinh())[:, 1:first].flatten(1)
    num = 1 if mode == "tensor" else 5
    torch.testing.assert_close(moved_BX[:, :num], torch.full((2, num), math.log(1.5)), rtol=1e-4, atol=1e-5)
    assert float(moved_BX[:, num:].abs().max()) < 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_a_layout_of_matrices_alone_has_no_means(mode: Scales) -> None:
    layout = Layout.from_state_dict(nn.Linear(20, 3, bias=False).state_dict())
    tokenizer, normalizer = tokenizer_of(mode), layout_normalizer(layout)
    assert tokenizer.num_header_chunks(layout) == 1
    values_BD = torch.randn(4, 60, generator=torch.Generator().manual_seed(0))
    chunks_BMK = tokenizer.chunks(values_BD, layout, normalizer, by_code=False)
    assert chunks_BMK.shape == (4, 1 + 8, 8)
    torch.testing.assert_close(tokenizer.values(chunks_BMK, layout, normalizer), values_BD, rtol=1e-4, atol=1e-5)
