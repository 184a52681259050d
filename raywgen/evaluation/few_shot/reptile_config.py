"""The settings by which Reptile meta-trains and adapts a network."""

from __future__ import annotations

from dataclasses import dataclass

from raywgen.evaluation.few_shot.errors import FewShotError
from raywgen.tasks.augment import check_augment


@dataclass(kw_only=True)
class ReptileConfig:
    """Settings of Reptile with Adam as the inner optimiser.

    Attributes:
        learning_rate: Learning rate of the inner Adam, whose first moment is off (beta1 = 0).
        head_learning_rate: Learning rate of the layer `head`; by default that of all others.
        inner_steps: Adam steps of a task in meta-training.
        inner_batch: Images of each of these steps.
        meta_batch: Tasks of a meta-step.
        meta_rate: Share of the way to the tasks' mean that the first meta-step goes.
        meta_rate_final: The same at the end; the rate falls linearly in between.
        train_shots: Images of each class that a task of meta-training has.
        augment: Augmentation of these images: empty, or `flip` and `shift-K` (K pixels), joined by `+`.
        num_meta_steps: Number of updates of the start.
        carry_moments: Whether Adam's second moments are carried over to the next task, as in the authors' code; else
            each task begins with none.
        symmetric_head: Whether all rows of the start's head are set to their mean; see the module.
        bf16: Whether the network runs in bfloat16 where that is safe; weights and Adam stay in float32.
        eval_batch: Images of a step that adapts to a new task; all of its support set where that has no more.
        eval_steps: Default number of steps that adapt to a new task.
        seed: Seed of the order of images.

    Raises:
        FewShotError: A value is out of range; the message names it.
    """

    learning_rate: float = 1e-3
    head_learning_rate: float | None = None
    inner_steps: int = 5
    inner_batch: int = 10
    meta_batch: int = 5
    meta_rate: float = 1.0
    meta_rate_final: float = 0.0
    train_shots: int = 10
    augment: str = ""
    num_meta_steps: int = 1000
    carry_moments: bool = True
    symmetric_head: bool = False
    bf16: bool = False
    eval_batch: int = 25
    eval_steps: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        names = ("inner_steps", "inner_batch", "meta_batch", "train_shots", "num_meta_steps", "eval_batch")
        for name in names:
            if getattr(self, name) < 1:
                raise FewShotError(f"{name}={getattr(self, name)}: must be at least 1")
        check_augment(self.augment)
        for name in ("meta_rate", "meta_rate_final"):
            if not 0 <= getattr(self, name) <= 1:
                raise FewShotError(f"{name}={getattr(self, name)}: must lie in [0, 1]")
        if not self.learning_rate > 0 or self.eval_steps < 0 or self.seed < 0:
            raise FewShotError(
                f"learning_rate={self.learning_rate}, eval_steps={self.eval_steps}, seed={self.seed}: give a rate "
                "above 0, and nothing negative"
            )

    def rate(self, meta_step: int) -> float:
        """Returns the meta rate of one of the meta-steps, counted from 0."""
        done = meta_step / self.num_meta_steps
        return (1 - done) * self.meta_rate + done * self.meta_rate_final
