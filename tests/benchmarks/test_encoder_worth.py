"""Heads on raw pixels, on an untrained encoder and on more of the encoder."""

from __future__ import annotations

import copy

import pytest
import torch

from raywgen.benchmarks.encoder_worth import ROWS, EncoderRows
from raywgen.evaluation.few_shot import prototype_logits, ridge_logits, standardise_blocks
from raywgen.tasks.networks.conv4 import Conv4

WAY = 3


@pytest.fixture(scope="module")
def encoder() -> Conv4:
    torch.manual_seed(0)
    network = Conv4(width=8)
    for _ in range(3):
        network(torch.randn(16, 1, 28, 28))
    return network.eval()


@pytest.fixture(scope="module")
def episodes() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    support, query = (torch.randn(2, num, 1, 28, 28, generator=generator) for num in (2 * WAY, 4))
    return support, torch.arange(WAY).repeat_interleave(2).expand(2, -1), query


def test_rows_are_heads_on_the_features_that_they_name(encoder: Conv4, episodes: tuple[torch.Tensor, ...]) -> None:
    support, labels_BS, query = episodes
    rows = EncoderRows(encoder, 0)
    support_BSE, query_BQE = (encoder(x.flatten(0, 1)).unflatten(0, x.shape[:2]) for x in (support, query))
    wanted = {
        "raw_pixels": prototype_logits(support.flatten(2), labels_BS, query.flatten(2), WAY),
        "features_ridge": ridge_logits(*_fitted([support_BSE], labels_BS, [query_BQE]), WAY),
    }
    for name, logits_BQC in wanted.items():
        torch.testing.assert_close(rows.logits(name, support, labels_BS, query, WAY), logits_BQC)
    both = rows.logits("encoder_ridge", support, labels_BS, query, WAY)
    assert not torch.allclose(both, wanted["features_ridge"], atol=1e-3)


def test_batch_normalisation_by_the_support_set_sees_no_contrast_and_no_other_episode(
    encoder: Conv4, episodes: tuple[torch.Tensor, ...]
) -> None:
    support, labels_BS, query = episodes
    rows, before = EncoderRows(encoder, 0), copy.deepcopy(encoder.state_dict())
    for name, row in ROWS.items():
        given = rows.logits(name, support, labels_BS, query, WAY)
        alone = rows.logits(name, support[1:], labels_BS[1:], query[1:], WAY)
        torch.testing.assert_close(given[1:], alone, rtol=1e-3, atol=1e-4)
        strong = rows.logits(name, 3 * support, labels_BS, 3 * query, WAY)
        if row.features in ("support", "untrained"):
            torch.testing.assert_close(strong, given, rtol=0.02, atol=0.02)
        elif row.features == "encoder":
            assert not torch.allclose(strong, given, rtol=0.02, atol=0.02)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def _fitted(
    support: list[torch.Tensor], labels_BS: torch.Tensor, query: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    support_BSE, query_BQE = standardise_blocks(support, query)
    return support_BSE, labels_BS, query_BQE
