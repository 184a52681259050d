"""What a zoo holds and how its networks are trained."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class ZooConfig:
    """Label-subset tasks on scikit-learn's digits, several architectures, each from one shared start.

    Attributes:
        widths: One ReLU perceptron per entry: features, hidden widths, classes.
        num_seen_tasks: Tasks whose networks a generator is trained on.
        num_validation_tasks: Tasks held out whole, to choose settings by.
        num_unseen_tasks: Tasks held out whole, to report on; their complements are in no other split.
        seeds_per_task: Networks per task and architecture, each with its own data order; the last one of a
            seen task is its held-out trajectory.
        checkpoint_steps: Optimiser steps whose weights are kept; the last one ends the training.
        batch_size: Images of a step.
        learning_rate: Of Adam.
        num_condition_samples: Labelled training images that a task shows to a generator.
        stack_size: Networks trained at once by one Ray task.
        seed: Of tasks, starts and data orders.
    """

    widths: list[list[int]] = field(default_factory=lambda: [[64, 14, 2], [64, 12, 8, 2]])
    num_seen_tasks: int = 240
    num_validation_tasks: int = 16
    num_unseen_tasks: int = 24
    seeds_per_task: int = 4
    checkpoint_steps: list[int] = field(default_factory=lambda: [450, 500])
    batch_size: int = 64
    learning_rate: float = 3e-3
    num_condition_samples: int = 64
    stack_size: int = 280
    seed: int = 0

    def __post_init__(self) -> None:
        counts = (self.num_seen_tasks, self.num_validation_tasks, self.num_unseen_tasks, self.stack_size)
        if min(counts) < 1 or self.seeds_per_task < 2:
            raise ValueError("a zoo needs at least one task of each split, one network a stack and two seeds per task")
        if not self.widths or len({tuple(widths) for widths in self.widths}) != len(self.widths):
            raise ValueError(f"widths={self.widths}: give at least one architecture, each once")
        if not self.checkpoint_steps or sorted(set(self.checkpoint_steps)) != list(self.checkpoint_steps):
            raise ValueError(f"checkpoint_steps={self.checkpoint_steps}: give ascending steps, each once")
        if self.checkpoint_steps[0] < 1 or self.learning_rate <= 0 or self.batch_size < 1:
            raise ValueError("checkpoint_steps, learning_rate and batch_size must be above 0")
