"""The settings that all methods share: of an optimiser, of a training stage, of a method, of sampling."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from typing_extensions import TypeVar

OptimizerKind = Literal["adamw", "sgd"]
Schedule = Literal["cosine", "linear", "constant"]


@dataclass(kw_only=True)
class OptimizerConfig:
    """The settings by which a stage turns gradients into steps.

    Attributes:
        kind: `adamw`, or `sgd` for plain gradient descent.
        learning_rate: Peak rate, reached after a linear warm-up.
        betas: Decay of AdamW's running means of gradients and of their squares.
        epsilon: Added to the root of AdamW's mean square.
        weight_decay: Decoupled weight decay; part of the gradient where `kind` is `sgd`.
        schedule: Shape of the rate after the warm-up: half a `cosine`, `linear`, or `constant`.
        warmup_steps: Steps of linear warm-up.
        floor: Share of the peak rate that the schedule ends at.
        grad_clip: Largest global norm of the gradient.
        ema_decay: Decay of an exponential moving average of the parameters, which validation, bundles and later stages
            use in place of the parameters; 0 for none.
    """

    kind: OptimizerKind = "adamw"
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    epsilon: float = 1e-8
    weight_decay: float = 0.01
    schedule: Schedule = "cosine"
    warmup_steps: int = 20
    floor: float = 0.05
    grad_clip: float = 1.0
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        if len(self.betas) != 2:
            raise ValueError(f"betas={list(self.betas)}: give two values, such as [0.9,0.99]")
        self.betas = (self.betas[0], self.betas[1])
        if self.learning_rate <= 0 or self.grad_clip <= 0 or self.epsilon <= 0:
            raise ValueError(
                f"learning_rate={self.learning_rate}, grad_clip={self.grad_clip}, epsilon={self.epsilon}: all must be "
                "above 0"
            )
        if not all(0 <= share < 1 for share in (*self.betas, self.ema_decay)):
            raise ValueError(f"betas={list(self.betas)}, ema_decay={self.ema_decay}: give values from 0 to below 1")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor={self.floor}: give a share of learning_rate, from 0 to 1")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps={self.warmup_steps}: must be at least 0")


@dataclass(kw_only=True)
class StageConfig:
    """Length of a training stage, the size of its batches, and its optimiser.

    Attributes:
        num_steps: Optimiser steps; 0 switches the stage off.
        batch_size: Networks of a step, over all workers.
        optimizer: Settings of the optimiser.
    """

    num_steps: int = 200
    batch_size: int = 32
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        if self.num_steps < 0 or self.batch_size < 1:
            raise ValueError(f"num_steps={self.num_steps} and batch_size={self.batch_size}: need at least 0 and 1")


def check_condition_dropout(share: float) -> None:
    """Refuses a share of networks trained without a part of their condition that is none.

    Raises:
        ValueError: It lies outside [0, 1).
    """
    if not 0 <= share < 1:
        raise ValueError(f"condition_dropout={share} must lie in [0, 1)")


@dataclass(kw_only=True)
class GeneratorConfig:
    """The base of every method's settings.

    A method's own dataclass inherits this one. All its fields have defaults; each stage has a field of the stage's name
    that holds a `StageConfig`.
    """


ConfigT_co = TypeVar("ConfigT_co", bound=GeneratorConfig, default=GeneratorConfig, covariant=True)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The sampling settings of a method; a method that has some defines a subclass."""


class SamplingError(ValueError):
    """Sampling settings that a generator does not have, or that do not fit it."""
