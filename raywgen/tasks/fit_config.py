"""The settings by which a network is fitted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from raywgen.tasks.augment import check_augment

FitOptimizer = Literal["adam", "adamw", "sgd"]
FitSchedule = Literal["constant", "cosine"]
FitLoss = Literal["balanced", "plain"]


@dataclass(kw_only=True)
class SAMConfig:
    """Sharpness-aware minimisation (Foret et al., arXiv 2010.01412), adaptive (Kwon et al., arXiv 2102.11600).

    Attributes:
        rho: Radius by the global norm of each network on its own; 0 switches it off. Two gradients a step.
        adaptive: Whether the radius is relative to each weight's size.
    """

    rho: float = 0.0
    adaptive: bool = False

    def __post_init__(self) -> None:
        if not self.rho >= 0:
            raise ValueError(f"sam.rho={self.rho}: must be at least 0")


@dataclass(kw_only=True)
class FitConfig:
    """The settings by which a network is trained.

    Attributes:
        optimizer: `adam`, `adamw`, or `sgd` with momentum.
        learning_rate: Rate at the first step.
        schedule: `constant`, or `cosine` down to zero at the last step.
        momentum: Momentum of `sgd`.
        weight_decay: Weight decay, decoupled for `adamw`, else part of the gradient.
        sam: Sharpness-aware minimisation.
        augment: Changes of images: `flip`, `shift-K` (K pixels), both joined by `+`, or empty for none.
        num_steps: Optimiser steps.
        batch_size: Samples of a step.
        loss: `balanced`: every class weighs the same over an epoch; `plain`: every sample does.

    Raises:
        ValueError: A value is unknown or out of range; the message names it.
    """

    optimizer: FitOptimizer = "adam"
    learning_rate: float = 3e-3
    schedule: FitSchedule = "constant"
    momentum: float = 0.9
    weight_decay: float = 0.0
    sam: SAMConfig = field(default_factory=SAMConfig)
    augment: str = ""
    num_steps: int = 500
    batch_size: int = 64
    loss: FitLoss = "balanced"

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        check_augment(self.augment)
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate}: must be above 0")
        if not 0 <= self.momentum < 1 or not self.weight_decay >= 0:
            raise ValueError(
                f"momentum={self.momentum} must lie in [0, 1), weight_decay={self.weight_decay} be at least 0"
            )

    @property
    def label(self) -> str:
        """Names the optimiser with its distinguishing settings: `adam`, `sgd-m0.9`, `adam-sam0.05`."""
        momentum = f"-m{self.momentum:g}" if self.optimizer == "sgd" and self.momentum else ""
        sam = f"-{'a' if self.sam.adaptive else ''}sam{self.sam.rho:g}" if self.sam.rho else ""
        return self.optimizer + momentum + sam
