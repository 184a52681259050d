"""A run as it travels from the process that launches it to every worker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from raywgen.generators import DataSpec, Generator
from raywgen.generators.bundle import build_generator
from raywgen.training.config import TrainConfig
from raywgen.weights import NormalizerTable


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """One run, as the launching process sends it to every worker.

    Attributes:
        config: The run's config.
        metadata: Facts for the cards of its bundles.
        normalizers: Base and scale of every layout of the corpus.
        data: Features and classes of the corpus' tasks.
        snapshot: Version of the corpus at launch; empty for the newest.
        stop_at: Share of the last stage's steps after which training stops with an ordinary checkpoint.
        init_from: Folder of a checkpoint from which a run begins that has none of its own.
        launch: Name of the launch, by which the workers' history tells a restart from a command given again.
    """

    config: TrainConfig
    metadata: dict[str, Any]
    normalizers: NormalizerTable
    data: DataSpec
    snapshot: str = ""
    stop_at: float = 1.0
    init_from: str = ""
    launch: str = ""

    def build(self) -> Generator:
        """A fresh generator; the same on every worker."""
        config = self.config
        return build_generator(config.method, config.generator, self.normalizers, self.data, config.seed)
