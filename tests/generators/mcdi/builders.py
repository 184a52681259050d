"""Small Mc-Di generators, and batches whose weights follow from what the tasks' support sets show.

Shape legend: B networks, k local targets, D values, C classes, S samples, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from raywgen.generators.common.network import NetworkConfig
from raywgen.generators.interface import DataSpec
from raywgen.generators.mcdi import McDi, McDiConfig, McDiSampling
from raywgen.generators.mcdi.config import DenoiserConfig, DiffusionConfig, McDiTaskLossConfig
from raywgen.generators.settings import OptimizerConfig
from raywgen.weights import Condition, Normalizer, NormalizerTable, WeightBatch
from tests.builders import NUM_FEATURES, SMALL, layout_of, network, normalizers, weight_batch

NUM_CLASSES = 3
HEAD = (NUM_FEATURES, NUM_CLASSES)
DATA = DataSpec(num_features=NUM_FEATURES, max_classes=NUM_CLASSES)


def config(
    *,
    diffusion: dict[str, Any] | None = None,
    network: dict[str, Any] | None = None,
    denoiser: dict[str, Any] | None = None,
    task_loss: dict[str, Any] | None = None,
    sampling: dict[str, Any] | None = None,
) -> McDiConfig:
    """Six steps with three local targets, a denoiser of width 16."""
    short: dict[str, Any] = {"num_steps": 6}
    walk: dict[str, Any] = {"num_steps": 6}
    small: dict[str, Any] = {"width": 16, "num_layers": 1, "num_heads": 2, "chunk_length": 8}
    steps: dict[str, Any] = {"num_steps": 5, "optimizer": OptimizerConfig(weight_decay=0.0, warmup_steps=0)}
    optimizer = OptimizerConfig(learning_rate=3e-4, weight_decay=0.0, warmup_steps=0)
    composed: dict[str, Any] = {"optimizer": optimizer} | (task_loss or {})
    return McDiConfig(
        diffusion=DiffusionConfig(**(short | (diffusion or {}))),
        network=NetworkConfig(**(small | (network or {}))),
        denoiser=DenoiserConfig(**(steps | (denoiser or {}))),
        task_loss=McDiTaskLossConfig(**composed),
        sampling=McDiSampling(**(walk | (sampling or {}))),
    )


def mcdi(settings: McDiConfig | None = None, table: NormalizerTable | None = None, seed: int = 0) -> McDi:
    """An untrained generator of linear heads, or of what `table` holds, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return McDi(settings or config(), head_normalizers() if table is None else table, DATA).eval()


def support_and_query(num: int, num_classes: int, seed: int, shot: int = 2) -> tuple[Condition, Condition]:
    """B tasks whose classes lie around means of their own; the query holds eight samples of each class."""
    generator = torch.Generator().manual_seed(seed)
    means_BCF = torch.randn(num, num_classes, NUM_FEATURES, generator=generator)

    def drawn(each: int) -> Condition:
        labels_S = torch.arange(num_classes).repeat_interleave(each)
        noise_BSF = torch.randn(num, len(labels_S), NUM_FEATURES, generator=generator)
        return Condition(
            instructions=("Which class?",) * num,
            samples_BSF=means_BCF[:, labels_S] + 0.3 * noise_BSF,
            labels_BS=labels_S.expand(num, -1),
        )

    return drawn(shot), drawn(8)


def head_of(support: Condition, num_classes: int) -> Tensor:
    """Values linear in the support means, `(B, D)`; of other features, so that no good head is where it begins."""
    means_BCF = torch.stack(
        [support.samples_BSF[:, support.labels_BS[0] == c].mean(dim=1) for c in range(num_classes)], dim=1
    )
    weight_BCF = means_BCF - means_BCF.mean(dim=1, keepdim=True)
    return torch.cat([weight_BCF.roll(1, dims=-1).flatten(1), 0.3 * weight_BCF.sum(dim=-1)], dim=1)


def head_batch(num: int = 16, seed: int = 0, num_targets: int = 3, widths: Sequence[int] = HEAD) -> WeightBatch:
    """Heads whose trajectories lead straight from zero to the end."""
    support, query = support_and_query(num, widths[1], seed)
    end_BD = head_of(support, widths[1])
    shares_k1 = torch.arange(1, num_targets + 1).unsqueeze(1) / num_targets
    return WeightBatch(
        values_BD=end_BD,
        layout=layout_of(widths),
        module=network(widths),
        condition=support,
        query=query,
        sample_index_B=torch.arange(num) + 1000 * seed,
        targets_BAD=end_BD.unsqueeze(1) * shares_k1,
    )


def chunk_batch(num: int = 16, seed: int = 0, num_targets: int = 3) -> WeightBatch:
    """Whole networks around the common start of `tests.builders`; trajectories lead straight from there."""
    batch = weight_batch(SMALL, num, seed)
    base_D = normalizers()[batch.layout.id][1].base_D
    shares_k1 = torch.arange(1, num_targets + 1).unsqueeze(1) / num_targets
    targets_BAD = base_D + (batch.values_BD - base_D).unsqueeze(1) * shares_k1
    return replace(batch, targets_BAD=targets_BAD, sample_index_B=batch.sample_index_B + 1000 * seed)


def head_normalizers() -> NormalizerTable:
    layout = layout_of(HEAD)
    return {layout.id: (layout, Normalizer.measure(layout, head_batch(64, seed=99).values_BD, None))}


def repeated(batch: WeightBatch, num: int, seed: int) -> WeightBatch:
    """One task B times, asked for with other noise."""
    assert batch.targets_BAD is not None
    return replace(
        batch,
        values_BD=batch.values_BD.expand(num, -1),
        targets_BAD=batch.targets_BAD.expand(num, -1, -1),
        condition=batch.condition.repeat(num),
        query=batch.query.repeat(num),
        sample_index_B=torch.arange(num) + 1000 * seed,
    )
