"""Stored tokens: they are made part by part, and the prior learns from them what it learns from weights.

Shape letters beyond the legend in `raywgen.weights`: M chunks of a network.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from raywgen.generators.igpg import IGPG
from raywgen.generators.igpg.stages import PriorStage
from raywgen.nn.quantisers import QuantiserConfig
from raywgen.weights import WeightBatch
from tests.builders import DEEP, SMALL, igpg, igpg_config, layout_of, noise_for, values_of, weight_batch

pytestmark = pytest.mark.usefixtures("one_thread")
NUM = 5
CASES: dict[str, dict[str, Any]] = {
    "residual": {},
    "beam": {"quantiser": QuantiserConfig(num_levels=3, num_codes=8, beam=3)},
    "gumbel": {"quantiser": QuantiserConfig(kind="gumbel", num_levels=2, num_codes=8)},
    "finite_scalar": {"quantiser": QuantiserConfig(kind="finite_scalar", num_levels=4, num_codes=16)},
    "conv": {"coder": "conv"},
    "transformer": {"coder": "transformer", "context": 3},
    "scales": {"scales": "filter"},
}


def generator_of(case: str, **prior: Any) -> IGPG:
    config = igpg_config()
    config.tokenizer = replace(config.tokenizer, **CASES[case])
    config.prior = replace(config.prior, **prior)
    generator = igpg(config)
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():  # Coders and heads begin with zeros.
        for parameter in generator.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draws))
    return generator


def encoded(generator: IGPG, batch: WeightBatch, length: int) -> Tensor:
    """Encodes networks in parts of a length in chunks, as a corpus is encoded."""
    encoder, layout, parts = generator.token_encoder(), batch.layout, []
    count = encoder.num_chunks(layout)
    for first in range(0, count, length):
        windows = encoder.windows(layout, first, min(first + length, count), len(batch))
        assert windows is not None
        moments_BN = encoder.moments(layout, lambda start, stop: batch.values_BD[:, start:stop])
        parts.append(encoder.encode(batch.cut(windows).values_BD, layout, windows, moments_BN))
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("case", CASES)
def test_parts_of_any_length_have_the_tokens_of_whole_networks(case: str) -> None:
    generator = generator_of(case)
    for widths in (SMALL, DEEP):
        batch = weight_batch(widths, NUM)
        expected_BML = generator.tokens(batch.values_BD, batch.layout)
        assert len(expected_BML.unique()) > 3
        for length in (1, 4, 100):
            assert torch.equal(encoded(generator, batch, length), expected_BML)


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("case", CASES)
def test_the_prior_has_equal_losses_from_tokens_and_from_weights(case: str, window: int) -> None:
    generator = generator_of(case, window=window, condition_dropout=0.3, independent_share=0.5)
    stage = PriorStage(generator.prior, generator.tokenizer, generator.normalizers)
    for seed in range(3):
        batch, noise = weight_batch(DEEP, NUM, seed), noise_for(NUM, seed)
        expected = stage(batch, noise).loss
        whole = replace(
            batch, values_BD=batch.values_BD[:, :0], codes_BWL=generator.tokens(batch.values_BD, batch.layout)
        )
        assert torch.equal(stage(whole, noise_for(NUM, seed)).loss, expected)
        windows = stage.windows(batch.layout, noise_for(NUM, seed))
        assert (windows is None) == (window == 0)
        if windows is not None:
            assert torch.equal(stage(whole.cut(windows), noise_for(NUM, seed)).loss, expected)
        assert whole.codes_BWL is not None
        other = replace(whole, codes_BWL=whole.codes_BWL.flip(1))
        assert not torch.equal(stage(other, noise_for(NUM, seed)).loss, expected)


def test_a_part_of_a_batch_of_tokens_holds_their_tokens() -> None:
    codes_BWL = torch.arange(24).reshape(4, 3, 2)
    batch = replace(weight_batch(SMALL, 4), codes_BWL=codes_BWL)
    index_N = torch.tensor([2, 0])
    for part in (batch.take(index_N), batch.to(torch.device("cpu")).take(index_N)):
        assert part.codes_BWL is not None
        assert torch.equal(part.codes_BWL, codes_BWL[index_N])


def test_the_digest_changes_with_all_that_decides_tokens_and_nothing_else() -> None:
    generator = generator_of("residual")
    digest = generator.token_encoder().digest()
    with torch.no_grad():
        for parameter in generator.prior.parameters():
            parameter.add_(1)
    assert generator.token_encoder().digest() == digest == generator_of("residual").token_encoder().digest()
    found = {digest}
    for tensor in (generator.tokenizer.quantiser.codebooks_LVK, *generator.tokenizer.encoder.parameters()):
        with torch.no_grad():
            tensor.view(-1)[0] += 1
        found.add(generator.token_encoder().digest())
    normalizer = generator.normalizer(layout_of(SMALL))
    normalizer.scale_N = normalizer.scale_N * 2
    found.add(generator.token_encoder().digest())
    assert len(found) == 3 + len(list(generator.tokenizer.encoder.parameters()))
    for case in CASES:
        found.add(generator_of(case).token_encoder().digest())
    assert len(found) == 2 + len(list(generator.tokenizer.encoder.parameters())) + len(CASES)


def test_only_layouts_of_the_training_corpus_are_known() -> None:
    encoder = generator_of("residual").token_encoder()
    layout = layout_of(SMALL)
    assert encoder.layout(layout.id) == layout
    assert encoder.layout("another") is None
    assert encoder.num_chunks(layout) == -(-values_of(SMALL).shape[1] // encoder.chunk_length)
