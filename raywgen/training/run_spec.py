"""A run as it travels from the process that launches it to every worker."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from raywgen.generators import DataSpec, Generator
from raywgen.generators.bundle import build_generator
from raywgen.nn import parameter_places
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

    def build(self, *, on_disk: bool = False) -> Generator:
        """Builds a fresh generator; the same on every worker.

        Args:
            on_disk: Whether its parameters are mapped from files, as ZeRO-3 shards them before they are used.
        """
        config = self.config
        with parameter_places.on_disk() if on_disk else nullcontext():
            return build_generator(config.method, config.generator, self.normalizers, self.data, config.seed)

    def skeleton(self) -> Generator:
        """Builds a generator for its stages, names and shapes alone: its parameters have no values."""
        try:
            with parameter_places.without_values():
                return self.build()
        except (RuntimeError, NotImplementedError):
            return self.build()  # A class of the user's own may read its parameters when it is built.
