"""Small Lo-Hp generators on the batches of Mc-Di's tests."""

from __future__ import annotations

from typing import Any

import torch

from raywgen.generators.common.network import NetworkConfig
from raywgen.generators.interface import DataSpec
from raywgen.generators.lohp import LoHp, LoHpConfig, LoHpSampling, PathConfig, PolicyConfig
from raywgen.generators.lohp.config import LoHpTaskLossConfig
from raywgen.generators.settings import OptimizerConfig
from raywgen.weights import NormalizerTable
from tests.builders import NUM_FEATURES, SMALL, normalizers
from tests.generators.mcdi.builders import NUM_CLASSES, head_normalizers

POLICIES = ("adam", "sgd-sam0.05")
DATA = DataSpec(num_features=NUM_FEATURES, max_classes=NUM_CLASSES, policies=POLICIES)
TABLES = {"head": head_normalizers, "flat": lambda: normalizers(SMALL), "chunks": lambda: normalizers(SMALL)}


def config(
    *,
    path: dict[str, Any] | None = None,
    network: dict[str, Any] | None = None,
    policy: dict[str, Any] | None = None,
    task_loss: dict[str, Any] | None = None,
    sampling_steps: int = 3,
) -> LoHpConfig:
    """Six steps in three sub-trajectories, networks of width 16."""
    short: dict[str, Any] = {"num_steps": 6, "length": 2, "noise": 0.5}
    small: dict[str, Any] = {"width": 16, "num_layers": 1, "num_heads": 2, "chunk_length": 8}
    optimizer = OptimizerConfig(weight_decay=0.0, warmup_steps=0)
    steps: dict[str, Any] = {"num_steps": 5, "batch_size": 8, "optimizer": optimizer}
    by_task: dict[str, Any] = steps | {"num_steps": 0} | (task_loss or {})
    return LoHpConfig(
        path=PathConfig(**(short | (path or {}))),
        network=NetworkConfig(**(small | (network or {}))),
        policy=PolicyConfig(**(steps | (policy or {}))),
        task_loss=LoHpTaskLossConfig(**by_task),
        sampling=LoHpSampling(num_steps=sampling_steps),
    )


def lohp(
    settings: LoHpConfig | None = None, table: NormalizerTable | None = None, seed: int = 0, data: DataSpec = DATA
) -> LoHp:
    """An untrained generator of linear heads, or of what `table` holds, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LoHp(settings or config(), head_normalizers() if table is None else table, data).eval()
