"""Baselines for a few-shot encoder: raw pixels, and ridge heads on the last two blocks of it and of an untrained one.

A comparison of heads on one encoder's features does not show whether these features help. These rows do: the same
episodes without any encoder, with one that was never trained, and with features that the encoder has but its last block
loses.

Shape letters beyond the legend in `raywgen.weights`: B episodes, S support samples, Q query samples.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from raywgen.benchmarks.few_shot_parts import Parts
from raywgen.evaluation.few_shot import accuracy, prototype_logits, ridge_logits, standardise_blocks
from raywgen.tasks.networks.conv4 import Conv4

_EPISODES_OF_A_BATCH = 50


@torch.no_grad()
def encoder_rows(parts: Parts, num_episodes: int, num_classes: int) -> dict[str, Tensor]:
    """Measures accuracy `(B,)` on the test episodes with less than the encoder's features, or with more.

    Returns:
        `raw_pixels`, nearest class means of the standardised pixels; `untrained_ridge`, a ridge head on the last two
        blocks of an untrained Conv-4 whose batch statistics are those of the support set; `encoder_ridge`, the same
        head on the last two blocks of the trained encoder.
    """
    encoder = parts.encoder.module
    assert isinstance(encoder, Conv4), "the benchmark trains its encoder itself"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(parts.seed)
        untrained = Conv4(in_channels=encoder.in_channels, image_size=encoder.image_size)
    scores: dict[str, list[Tensor]] = {"raw_pixels": [], "untrained_ridge": [], "encoder_ridge": []}
    for first in range(0, num_episodes, _EPISODES_OF_A_BATCH):
        num = min(_EPISODES_OF_A_BATCH, num_episodes - first)
        episodes = parts.test.pixels.batch(first, num)
        support, query = parts.test.prepare(episodes.support_x), parts.test.prepare(episodes.query_x)
        support_y, query_y = episodes.support_y, episodes.query_y
        pixel_logits = prototype_logits(support.flatten(2), support_y, query.flatten(2), num_classes)
        scores["raw_pixels"].append(accuracy(pixel_logits, query_y))
        for name, network, own_statistics in (("untrained_ridge", untrained, True), ("encoder_ridge", encoder, False)):
            pairs = [_last_blocks(network, support[b], query[b], own_statistics) for b in range(num)]
            blocks = [[torch.stack(part) for part in zip(*side, strict=True)] for side in zip(*pairs, strict=True)]
            support_BSE, query_BQE = standardise_blocks(*blocks)
            logits_BQC = ridge_logits(support_BSE, support_y, query_BQE, num_classes)
            scores[name].append(accuracy(logits_BQC, query_y))
    return {name: torch.cat(rows) for name, rows in scores.items()}


def _last_blocks(
    network: Conv4, support: Tensor, query: Tensor, own_statistics: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Features `(S, E)` and `(Q, E)` of the last two blocks of one episode.

    Args:
        network: Any Conv-4; its stored statistics are overwritten where `own_statistics` is true.
        support: Standardised images `(S, C, H, W)`.
        query: Standardised images `(Q, C, H, W)`.
        own_statistics: Normalise every batch-norm layer by the support set instead of by stored statistics.
    """
    network.eval()
    if own_statistics:
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = 1.0  # The statistics of this batch alone.
                layer.train()
        network.features(support)
        network.eval()
    sides = []
    for images in (support, query):
        before_last = network.blocks[:-1](images)
        sides.append([before_last.flatten(1), network.blocks[-1](before_last).flatten(1)])
    return sides[0], sides[1]
