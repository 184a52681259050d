"""Baselines for a few-shot encoder: heads on raw pixels, on an untrained encoder, and on more of the encoder's blocks.

A comparison of heads on one encoder's features does not show whether these features help. These rows do: the same
episodes without any encoder, with one that was never trained, with features that the encoder has but its last block
loses, and with batch normalisation by the support set of each episode.

Shape letters beyond the legend in `raywgen.weights`: B episodes, S support samples, Q query samples.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from raywgen.benchmarks.few_shot_parts import Side
from raywgen.evaluation.few_shot import accuracy, prototype_logits, ridge_logits, standardise_blocks
from raywgen.tasks.networks.conv4 import Conv4

_EPISODES_OF_A_BATCH = 50

Features = Literal["pixels", "untrained", "encoder", "support"]
Blocks = tuple[list[Tensor], list[Tensor]]
"""Features of support samples and of query samples, block after block."""


@dataclass(frozen=True, slots=True)
class Row:
    """A head on some features.

    Attributes:
        features: `pixels`, standardised; `untrained`, a Conv-4 that was never trained, normalised by the support set;
            `encoder`, the encoder as it is stored; `support`, the encoder normalised by the support set.
        num_blocks: How many of the last blocks the head sees.
        head: `means`, the nearest class mean; `ridge`, a ridge head on blocks that are centred and scaled by the
            support set.
    """

    features: Features
    num_blocks: int
    head: Literal["means", "ridge"]


ROWS = {
    "raw_pixels": Row("pixels", 1, "means"),
    "raw_pixels_ridge": Row("pixels", 1, "ridge"),
    "untrained": Row("untrained", 1, "means"),
    "untrained_ridge": Row("untrained", 2, "ridge"),
    "features_ridge": Row("encoder", 1, "ridge"),
    "encoder_ridge": Row("encoder", 2, "ridge"),
    "support_prototypes": Row("support", 1, "means"),
    "support_ridge": Row("support", 2, "ridge"),
}
"""The rows by the names of their figures; `features_ridge` sees what generators see."""


class EncoderRows:
    """The rows for one encoder.

    Args:
        encoder: The trained encoder, which stays as it is.
        seed: Seed of the untrained one.
    """

    def __init__(self, encoder: nn.Module, seed: int) -> None:
        assert isinstance(encoder, Conv4), "the benchmark trains its encoder itself"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            untrained = Conv4(in_channels=encoder.in_channels, image_size=encoder.image_size)
        self._stored = encoder
        self._by_support = {"untrained": _forgetful(untrained), "support": _forgetful(copy.deepcopy(encoder))}

    @torch.no_grad()
    def accuracies(self, side: Side, num_episodes: int, num_classes: int) -> dict[str, Tensor]:
        """Returns the accuracy `(B,)` of each row on the first episodes of a side."""
        scores: dict[str, list[Tensor]] = {name: [] for name in ROWS}
        for first in range(0, num_episodes, _EPISODES_OF_A_BATCH):
            episodes = side.pixels.batch(first, min(_EPISODES_OF_A_BATCH, num_episodes - first))
            support, query = side.prepare(episodes.support_x), side.prepare(episodes.query_x)
            of_kind = {kind: self._blocks(kind, support, query) for kind in get_args(Features)}
            for name, row in ROWS.items():
                logits_BQC = _logits(row, of_kind[row.features], episodes.support_y, num_classes)
                scores[name].append(accuracy(logits_BQC, episodes.query_y))
        return {name: torch.cat(parts) for name, parts in scores.items()}

    @torch.no_grad()
    def logits(self, name: str, support: Tensor, support_y_BS: Tensor, query: Tensor, num_classes: int) -> Tensor:
        """Returns the logits `(B, Q, C)` of one row.

        Args:
            name: Of the row.
            support: Standardised images `(B, S, C, H, W)`.
            support_y_BS: Their labels.
            query: Standardised images `(B, Q, C, H, W)`.
            num_classes: Classes of an episode.
        """
        return _logits(ROWS[name], self._blocks(ROWS[name].features, support, query), support_y_BS, num_classes)

    def _blocks(self, kind: Features, support: Tensor, query: Tensor) -> Blocks:
        if kind == "pixels":
            return [support.flatten(2)], [query.flatten(2)]
        if kind == "encoder":
            return _last_blocks(self._stored, support), _last_blocks(self._stored, query)
        network, episodes = self._by_support[kind], []
        for support_SCHW, query_QCHW in zip(support, query, strict=True):
            network.train()(support_SCHW)
            network.eval()
            episodes.append((_last_blocks(network, support_SCHW[None]), _last_blocks(network, query_QCHW[None])))
        support_blocks, query_blocks = (
            [torch.cat(block) for block in zip(*side, strict=True)] for side in zip(*episodes, strict=True)
        )
        return support_blocks, query_blocks


def _forgetful(network: Conv4) -> Conv4:
    """Lets each batch in training mode replace the statistics of batch normalisation by its own."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    return network


def _logits(row: Row, blocks: Blocks, support_y_BS: Tensor, num_classes: int) -> Tensor:
    support, query = (side[-row.num_blocks :] for side in blocks)
    if row.head == "means":
        return prototype_logits(torch.cat(support, dim=2), support_y_BS, torch.cat(query, dim=2), num_classes)
    support_BSE, query_BQE = standardise_blocks(support, query)
    return ridge_logits(support_BSE, support_y_BS, query_BQE, num_classes)


def _last_blocks(network: Conv4, images: Tensor) -> list[Tensor]:
    """Features `(B, S, E)` of the last two blocks, of images `(B, S, C, H, W)`."""
    B = len(images)
    before_last = network.blocks[:-1](images.flatten(0, 1))
    return [
        before_last.flatten(1).unflatten(0, (B, -1)),
        network.blocks[-1](before_last).flatten(1).unflatten(0, (B, -1)),
    ]
