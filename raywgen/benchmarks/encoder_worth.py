"""Baselines for a few-shot encoder: heads on raw pixels, on an untrained encoder, and on more of the encoder's blocks.

A comparison of heads on one encoder's features does not show whether these features help. These rows do: the same
episodes without any encoder, with one that was never trained, with features that the encoder has but its last block
loses, and with batch normalisation by the support set of each episode.

Shape letters beyond the legend in `raywgen.weights`: B episodes, S support samples, Q query samples, F values of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from raywgen.benchmarks.few_shot_parts import Side
from raywgen.evaluation.few_shot import accuracy
from raywgen.tasks.encoders import FrozenEncoder
from raywgen.tasks.networks.conv4 import Conv4
from raywgen.tasks.support_heads import nearest_means_head, ridge_blocks_head

Features = Literal["pixels", "untrained", "encoder", "support"]
Blocks = tuple[list[Tensor], list[Tensor]]
"""Features `(S, E)` of support samples and `(Q, E)` of query samples, block after block."""


@dataclass(frozen=True, slots=True)
class Row:
    """A head on some features.

    Attributes:
        features: `pixels`, standardised; `untrained`, a Conv-4 that was never trained, normalised by the support set;
            `encoder`, the encoder as it is stored; `support`, the encoder normalised by the support set.
        num_blocks: How many of the last blocks the head sees.
        head: `means`, the nearest class mean; `ridge`, ridge regression on blocks that are centred and scaled by the
            support set. Both are the heads of `raywgen adapt`.
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

    def __init__(self, encoder: FrozenEncoder, seed: int) -> None:
        conv4 = encoder.module
        assert isinstance(conv4, Conv4), "the benchmark trains its encoder itself"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            untrained = Conv4(in_channels=conv4.in_channels, image_size=conv4.image_size)
        self._stored = encoder
        self._by_support = {
            "untrained": FrozenEncoder(untrained, name="untrained", identity=""),
            "support": encoder,
        }

    @torch.no_grad()
    def accuracies(
        self, side: Side, num_episodes: int, num_classes: int, kinds: Sequence[Features] = get_args(Features)
    ) -> dict[str, Tensor]:
        """Returns the accuracy `(B,)` of each row with features of some kinds on the first episodes of a side."""
        rows = {name: row for name, row in ROWS.items() if row.features in kinds}
        scores: dict[str, list[Tensor]] = {name: [] for name in rows}
        for index in range(num_episodes):
            episode = side.pixels.episode(index)
            support, query = side.prepare(episode.support_x), side.prepare(episode.query_x)
            of_kind = {kind: self._blocks(kind, support, query) for kind in kinds}
            for name, row in rows.items():
                logits_QC = _logits(row, of_kind[row.features], episode.support_y, num_classes)
                scores[name].append(accuracy(logits_QC, episode.query_y))
        return {name: torch.stack(parts) for name, parts in scores.items()}

    @torch.no_grad()
    def logits(self, name: str, support: Tensor, support_y_S: Tensor, query: Tensor, num_classes: int) -> Tensor:
        """Returns the logits `(Q, C)` of one row.

        Args:
            name: Of the row.
            support: Standardised images `(S, C, H, W)`.
            support_y_S: Their labels.
            query: Standardised images `(Q, C, H, W)`.
            num_classes: Classes of an episode.
        """
        return _logits(ROWS[name], self._blocks(ROWS[name].features, support, query), support_y_S, num_classes)

    def _blocks(self, kind: Features, support: Tensor, query: Tensor) -> Blocks:
        support_SF, query_QF = support.flatten(1), query.flatten(1)
        if kind == "pixels":
            return [support_SF], [query_QF]
        encoder = self._stored if kind == "encoder" else self._by_support[kind].normalised_by(support_SF)
        return encoder.last_blocks(support_SF), encoder.last_blocks(query_QF)


def _logits(row: Row, blocks: Blocks, support_y_S: Tensor, num_classes: int) -> Tensor:
    support, query = (side[-row.num_blocks :] for side in blocks)
    if row.head == "means":
        head = nearest_means_head(torch.cat(support, dim=1), support_y_S, num_classes)
    else:
        head = ridge_blocks_head(support, support_y_S, num_classes)
    return head(torch.cat(query, dim=1))
