"""Tokens that hold nothing but padding: known before they are written, and no part of any likelihood.

Shape legend: B networks, M chunks, W chunks of a window, L levels.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from raywgen.generators.common.tokenizer.windows import random_windows
from raywgen.generators.igpg import IGPG, SamplingConfig
from raywgen.generators.igpg.likelihood import token_nll
from raywgen.generators.igpg.token_sampling import TokenSample, sample_tokens
from raywgen.nn.quantisers import QuantiserConfig, QuantiserKind
from raywgen.weights import WeightBatch
from tests.builders import (
    condition,
    igpg,
    igpg_config,
    layout_of,
    noise_for,
    normalizers,
    part_of,
    values_of,
    weight_batch,
)

pytestmark = pytest.mark.usefixtures("one_thread")
# 174 values: the last of its chunks of 8 holds 6, three parts of 2 and one of padding.
WIDE = (6, 20, 2)
NUM = 4
CODERS = {"gumbel": 8, "finite_scalar": 9}
WAYS: dict[str, tuple[int, SamplingConfig]] = {
    "whole": (0, SamplingConfig()),
    "sequential": (5, SamplingConfig(overlap=0.5)),
    "parallel": (5, SamplingConfig(windows="parallel", max_rows=8)),
    "independent": (0, SamplingConfig(chunks="independent")),
    "guided": (0, SamplingConfig(guidance=2.0, top_k=3, top_p=0.9)),
}


def generator_of(quantiser: QuantiserKind, scales: str = "normalizer", window: int = 0, **settings: Any) -> IGPG:
    config = igpg_config()
    config.tokenizer = dataclasses.replace(
        config.tokenizer,
        quantiser=QuantiserConfig(kind=quantiser, num_codes=CODERS.get(quantiser, 8), num_levels=4),
        scales=scales,
    )
    config.prior = dataclasses.replace(config.prior, window=window, condition_dropout=0.1, **settings)
    built = igpg(config, normalizers(WIDE))
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (built.prior.head.query, built.prior.head.free, built.prior.head.bias):
            parameter.normal_(std=0.5, generator=draws)
        if quantiser == "gumbel":
            # A code of zeros that is not the first one.
            built.tokenizer.quantiser.get_parameter("logits_of.bias")[5] = 9.0
    return built


def is_real(generator: IGPG) -> Tensor:
    """Bool `(M, L)`, value by value."""
    mask_MK = generator.tokenizer.mask(layout_of(WIDE))
    return torch.tensor([[bool(part.any()) for part in mask_K.split(2)] for mask_K in mask_MK])


def sample(generator: IGPG, sampling: SamplingConfig, temperature: float = 1.0) -> TokenSample:
    tokenizer = generator.tokenizer
    table = tokenizer.table(layout_of(WIDE))
    return sample_tokens(
        generator.prior, condition(NUM), table, tokenizer.quantiser, noise_for(NUM), temperature, sampling
    )


@pytest.mark.parametrize("quantiser", CODERS)
@pytest.mark.parametrize("scales", ["normalizer", "tensor", "filter"])
@pytest.mark.parametrize("way", WAYS)
def test_written_and_read_tokens_of_padding_are_those_of_zeros_and_equally_likely(
    quantiser: QuantiserKind, scales: str, way: str
) -> None:
    window, sampling = WAYS[way]
    generator = generator_of(quantiser, scales, window)
    tokenizer, layout = generator.tokenizer, layout_of(WIDE)
    is_real_ML = is_real(generator)
    assert int((~is_real_ML).sum()) >= (1 if scales == "normalizer" else 2)
    zeros_L = tokenizer.quantiser.encode(torch.zeros(1, 8))[0]
    padding_XL = zeros_L.expand_as(is_real_ML)[~is_real_ML]
    assert bool((generator.tokens(values_of(WIDE)[:NUM], layout)[:, ~is_real_ML] == padding_XL).all())
    for temperature in (0.0, 1.0):
        written = sample(generator, sampling, temperature)
        assert bool((written.codes_BML[:, ~is_real_ML] == padding_XL).all())
        cond, table, rvq = condition(NUM), tokenizer.table(layout), tokenizer.quantiser
        with torch.no_grad():
            read_BM = generator.prior.log_likelihood(written.codes_BML, cond, table, rvq, sampling)
            hidden_BMH = generator.prior.hidden(written.codes_BML, cond, table, rvq, sampling)
            # All tokens of a chunk that hold values come before those that hold none.
            log_p_BML = generator.prior.head.log_likelihood(hidden_BMH, written.codes_BML, rvq)
        # Cached and full attention round differently.
        torch.testing.assert_close(written.log_prob_BM, read_BM, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(read_BM, (log_p_BML * is_real_ML).sum(dim=2), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(read_BM, log_p_BML.sum(dim=2), atol=1e-2)


@pytest.mark.parametrize("quantiser", CODERS)
@pytest.mark.parametrize("way", WAYS)
def test_the_expected_code_of_padding_is_its_code(quantiser: QuantiserKind, way: str) -> None:
    window, sampling = WAYS[way]
    generator = generator_of(quantiser, "filter", window)
    written = sample(generator, sampling)
    assert written.expected_BMK is not None
    is_real_MK = is_real(generator).repeat_interleave(2, dim=1)
    decoded_BMK = generator.tokenizer.quantiser.decode(written.codes_BML)
    assert torch.equal(written.expected_BMK[:, ~is_real_MK], decoded_BMK[:, ~is_real_MK])
    assert not torch.allclose(written.expected_BMK[:, is_real_MK], decoded_BMK[:, is_real_MK], atol=1e-2)


@pytest.mark.parametrize("quantiser", CODERS)
@pytest.mark.parametrize(("window", "share"), [(0, 0.0), (5, 0.0), (0, 1.0), (5, 0.5)])
def test_the_loss_is_the_mean_over_tokens_that_hold_values(quantiser: QuantiserKind, window: int, share: float) -> None:
    # Windows get no scales where these are no tokens.
    generator = generator_of(quantiser, "normalizer" if window else "filter", window, independent_share=share)
    tokenizer, prior, batch = generator.tokenizer, generator.prior, weight_batch(WIDE)
    codes_BML, positions_MG = generator.tokens(batch.values_BD, batch.layout), tokenizer.positions(batch.layout)
    is_real_ML, noise = is_real(generator), noise_for(8)
    M = len(positions_MG)
    index_BW = random_windows(noise, M, window) if window else torch.arange(M).expand(8, -1)
    assert not bool(is_real_ML[index_BW].all())
    is_alone_B = noise.uniform(1)[:, 0] < share
    prefix_BTH = prior.prefix(batch.condition, positions_MG.mean(dim=0))
    losses = []
    for b, index_W in enumerate(index_BW):
        codes_1WL = codes_BML[b : b + 1, index_W]
        if is_alone_B[b]:
            hidden = prior.states_alone(prefix_BTH[b : b + 1], positions_MG[index_W].unsqueeze(0))
        else:
            hidden = prior.states(prefix_BTH[b : b + 1], positions_MG[index_W], tokenizer.quantiser.decode(codes_1WL))
        log_p_WL = prior.head.log_likelihood(hidden, codes_1WL, tokenizer.quantiser)[0]
        losses.append(-log_p_WL[is_real_ML[index_W]].mean())
    # In evaluation no part of a condition is left out; chunks are on their own only where they always are.
    prior.train(share > 0)
    prior.config.condition_dropout = 0.0
    nll = token_nll(prior, tokenizer, batch, generator.normalizers, noise_for(8))
    torch.testing.assert_close(nll, torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)


def half(batch: WeightBatch, part: slice) -> WeightBatch:
    cond = part_of(batch.condition, part)
    values_BD, index_B = batch.values_BD[part], batch.sample_index_B[part]
    return dataclasses.replace(batch, values_BD=values_BD, condition=cond, sample_index_B=index_B)


def test_two_workers_halves_have_the_loss_of_the_whole_whatever_padding_their_windows_hold() -> None:
    generator, batch = generator_of("gumbel", "filter", 2), weight_batch(WIDE)

    def nll(part: slice) -> Tensor:
        noise = noise_for(part.stop - part.start, first=part.start)
        return token_nll(generator.prior, generator.tokenizer, half(batch, part), generator.normalizers, noise)

    halves = nll(slice(0, 4)) + nll(slice(4, 8))
    torch.testing.assert_close(nll(slice(0, 8)), halves / 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("quantiser", CODERS)
def test_what_stands_in_the_padding_changes_nothing(quantiser: QuantiserKind) -> None:
    generator, layout = generator_of(quantiser), layout_of(WIDE)
    tokenizer = generator.tokenizer
    chunks_BMK = tokenizer.chunks(values_of(WIDE)[:NUM], layout, generator.normalizer(layout))
    positions_MG, mask_MK = tokenizer.positions(layout), tokenizer.mask(layout)
    dirty_BMK = chunks_BMK + 3 * (1 - mask_MK)
    assert not torch.equal(dirty_BMK, chunks_BMK)
    assert torch.equal(*(tokenizer.encode(each, positions_MG, mask_MK) for each in (chunks_BMK, dirty_BMK)))


def test_half_precision_takes_the_same_code_for_padding() -> None:
    generator, layout = generator_of("gumbel"), layout_of(WIDE)
    bias_V = generator.tokenizer.quantiser.get_parameter("logits_of.bias")
    with torch.no_grad():
        # The same in bfloat16, where the first of them would be taken.
        bias_V[2], bias_V[6] = 20.0, 20.001
    padding_codes_ML = generator.tokenizer.table(layout).padding_codes_ML
    with torch.autocast("cpu", dtype=torch.bfloat16):
        codes_BML = generator.tokens(values_of(WIDE)[:NUM], layout)
    assert padding_codes_ML is not None
    assert padding_codes_ML[padding_codes_ML >= 0].tolist() == [6]
    assert bool((codes_BML[:, padding_codes_ML >= 0] == 6).all())


@pytest.mark.parametrize("quantiser", CODERS)
def test_stages_train_with_padding(quantiser: QuantiserKind) -> None:
    generator, batch = generator_of(quantiser, "filter", 5), weight_batch(WIDE)
    for stage in generator.stages()[1:]:
        stage.train()
        loss = stage(batch, noise_for(8)).loss
        loss.backward()
        assert 0 < float(loss.detach()) < 100
        gradients = [each.grad for each in generator.prior.parameters() if each.grad is not None]
        assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_where_each_token_has_a_say_in_its_whole_chunk_nothing_is_known_before() -> None:
    table = generator_of("residual", "filter").tokenizer.table(layout_of(WIDE))
    assert table.padding_codes_ML is None
    assert table.num_real_tokens is None
