"""Heads on raw pixels, on an untrained encoder and on more of the encoder."""

from __future__ import annotations

import pytest
import torch

from raywgen.benchmarks.encoder_worth import ROWS, EncoderRows
from raywgen.evaluation.few_shot import prototype_logits
from raywgen.tasks.encoders import FrozenEncoder
from raywgen.tasks.networks.conv4 import Conv4
from raywgen.tasks.support_heads import ridge_blocks_head

WAY = 3
LABELS_S = torch.arange(WAY).repeat_interleave(2)


@pytest.fixture(scope="module")
def encoder() -> FrozenEncoder:
    torch.manual_seed(0)
    network = Conv4(width=8)
    for _ in range(3):
        network(torch.randn(16, 1, 28, 28))
    return FrozenEncoder(network, name="own", identity="")


@pytest.fixture(scope="module")
def episode() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    # Classes have patterns of their own: ridge regression of noise would be all but zero, and say nothing.
    pattern_CCHW, labels_Q = torch.randn(WAY, 1, 28, 28, generator=generator), torch.arange(4) % WAY
    return tuple(
        pattern_CCHW[labels] + 0.3 * torch.randn(len(labels), 1, 28, 28, generator=generator)
        for labels in (LABELS_S, labels_Q)
    )


def test_rows_are_heads_on_the_features_that_they_name(
    encoder: FrozenEncoder, episode: tuple[torch.Tensor, ...]
) -> None:
    support, query = episode
    rows = EncoderRows(encoder, 0)
    pixels = prototype_logits(support.flatten(1)[None], LABELS_S[None], query.flatten(1)[None], WAY)[0]
    found = rows.logits("raw_pixels", support, LABELS_S, query, WAY)
    assert torch.equal(found.argmax(dim=1), pixels.argmax(dim=1))
    # A ridge head does not mind the encoder's own centre and spread.
    last = ridge_blocks_head([encoder(support.flatten(1))], LABELS_S, WAY)(encoder(query.flatten(1)))
    torch.testing.assert_close(rows.logits("features_ridge", support, LABELS_S, query, WAY), last)
    both = rows.logits("encoder_ridge", support, LABELS_S, query, WAY)
    assert not torch.allclose(both, last, atol=1e-3)


def test_batch_normalisation_by_the_support_set_sees_no_contrast(
    encoder: FrozenEncoder, episode: tuple[torch.Tensor, ...]
) -> None:
    support, query = episode
    rows, before = EncoderRows(encoder, 0), encoder.fingerprint
    for name, row in ROWS.items():
        given = rows.logits(name, support, LABELS_S, query, WAY)
        strong = rows.logits(name, 3 * support, LABELS_S, 3 * query, WAY)
        if row.features in ("support", "untrained"):
            torch.testing.assert_close(strong, given, rtol=0.02, atol=0.02)
        elif row.features == "encoder":
            assert not torch.allclose(strong, given, rtol=0.02, atol=0.02)
    del encoder.fingerprint
    assert encoder.fingerprint == before
