"""What a zoo holds and how its networks are trained."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

_NUM_PIXELS, _NUM_CLASSES = 64, 2
_NOT_OF_THE_RECIPE = ("out", "stack_size")


@dataclass(kw_only=True)
class ZooConfig:
    """Label-subset tasks on scikit-learn's digits, several architectures, each from one shared start.

    Longer or faster training gives better networks whose seeds lie further apart, which makes them harder to
    generate. At the defaults the networks reach a balanced test accuracy of 0.955, and two seeds of a task lie a
    third as far from each other as two tasks do.

    Attributes:
        networks: One ReLU perceptron an entry: 64 pixels, hidden widths, 2 classes.
        num_seen_tasks: Tasks whose networks a generator is trained on.
        num_validation_tasks: Tasks held out whole, to choose settings by.
        num_unseen_tasks: Tasks held out whole, to report on.
        seeds_per_task: Networks per task and architecture, each with its own data order; the last one of a
            seen task is its held-out trajectory.
        num_steps: Optimiser steps of each network.
        checkpoint_steps: Steps whose weights are kept, ascending.
        batch_size: Images of a step.
        learning_rate: Of Adam.
        num_condition_samples: Labelled training images that a task shows to a generator.
        stack_size: Networks that one Ray task trains at once.
        seed: Of tasks, starts, data orders and condition samples.
        out: Where the corpus goes: a path or URI that all nodes reach.

    Raises:
        ValueError: A value makes no zoo; the message names it.
    """

    networks: list[list[int]] = field(default_factory=lambda: [[64, 14, 2], [64, 12, 8, 2]])
    num_seen_tasks: int = 240
    num_validation_tasks: int = 16
    num_unseen_tasks: int = 24
    seeds_per_task: int = 4
    num_steps: int = 500
    checkpoint_steps: list[int] = field(default_factory=lambda: [450, 500])
    batch_size: int = 64
    learning_rate: float = 3e-3
    num_condition_samples: int = 64
    stack_size: int = 240
    seed: int = 0
    out: str = "runs/zoo/corpus"

    def __post_init__(self) -> None:
        for name in ("num_seen_tasks", "num_validation_tasks", "num_unseen_tasks", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 0")
        for name in ("num_steps", "batch_size", "num_condition_samples", "stack_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.num_seen_tasks + self.num_validation_tasks + self.num_unseen_tasks == 0:
            raise ValueError("num_seen_tasks, num_validation_tasks and num_unseen_tasks are all 0; ask for a task")
        if self.seeds_per_task < 2:
            raise ValueError(f"seeds_per_task={self.seeds_per_task}: must be at least 2, as the last one is held out")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate}: must be above 0")
        self._check_networks()
        self._check_checkpoint_steps()

    def recipe(self) -> dict[str, Any]:
        """What decides the networks: all but where they are stored and how many are trained at once."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in _NOT_OF_THE_RECIPE}

    def _check_networks(self) -> None:
        if not self.networks or len({tuple(widths) for widths in self.networks}) != len(self.networks):
            raise ValueError(f"networks={self.networks}: give at least one architecture, and each once")
        for widths in self.networks:
            if len(widths) < 2 or min(widths) < 1 or widths[0] != _NUM_PIXELS or widths[-1] != _NUM_CLASSES:
                raise ValueError(
                    f"networks: {widths} does not run from {_NUM_PIXELS} pixels to {_NUM_CLASSES} classes; "
                    "write it for instance [64, 14, 2]"
                )

    def _check_checkpoint_steps(self) -> None:
        steps = list(self.checkpoint_steps)
        if not steps or sorted(set(steps)) != steps or steps[0] < 1 or steps[-1] > self.num_steps:
            raise ValueError(
                f"checkpoint_steps={steps}: give ascending steps from 1 to num_steps={self.num_steps}, each once"
            )
