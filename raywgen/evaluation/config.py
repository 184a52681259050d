"""The settings of an evaluation: what it compares, and the budget that all sides get."""

from __future__ import annotations

from dataclasses import dataclass, field

from raywgen.nn.devices import Device


@dataclass(kw_only=True)
class EvaluateConfig:
    """Settings of an evaluation: ladder, baselines and novelty.

    Attributes:
        generator: Run folder of the generator, a local path or a URI.
        hypernetwork: Run folder of a hypernetwork trained on the same corpus; empty to leave that row out.
        corpus: The corpus that the generator was trained on.
        out: Folder for `evaluation.json`: a local path, or a URI of an object store.
        best_of: Candidates per network, for the generator and every baseline; the lowest loss on the labelled
            examples wins.
        temperature: Sampling temperature of generation.
        num_tasks: Maximum number of tasks of each split.
        finetune_epochs: Epochs of fine-tuning, each a row: passes over the task's training images.
        finetune_learning_rates: Learning rates of Adam; if there are several, each start gets the one that is best on
            held-out training images.
        gradient_steps: Optimiser steps of the baseline that fits the shared start to the labelled examples.
        gradient_learning_rate: Learning rate of that baseline.
        noise: Noise of the baseline that adds it to a stored network, in standard deviations of each tensor over the
            corpus.
        num_unlabelled: Training inputs of each task from which statistics of batch normalisation of all candidates are
            estimated anew; 0 leaves them as they are. Originals keep theirs.
        seed: Seed of the candidates.
        device: The device that generates and runs networks, fine-tuning excepted: `cpu`, `cuda`, or `auto`: a GPU
            where there is one.

    Examples:
        >>> raywgen.EvaluateConfig(generator="runs/mine", best_of=4).finetune_epochs
        [1, 5]
    """

    generator: str = "runs/igpg"
    hypernetwork: str = ""
    corpus: str = "runs/zoo/corpus"
    out: str = "runs/igpg/evaluation"
    best_of: int = 8
    temperature: float = 0.5
    num_tasks: int = 24
    finetune_epochs: list[int] = field(default_factory=lambda: [1, 5])
    finetune_learning_rates: list[float] = field(default_factory=lambda: [3e-3])
    gradient_steps: int = 200
    gradient_learning_rate: float = 3e-3
    noise: float = 0.1
    num_unlabelled: int = 0
    seed: int = 0
    device: Device = "auto"

    def __post_init__(self) -> None:
        if min(self.best_of, self.num_tasks, self.gradient_steps, *self.finetune_epochs) < 1:
            raise ValueError("best_of, num_tasks, gradient_steps and finetune_epochs must be at least 1")
        if self.num_unlabelled < 0 or self.num_unlabelled == 1:
            raise ValueError(
                f"num_unlabelled={self.num_unlabelled}: statistics need at least 2 samples; 0 estimates none"
            )
        if self.temperature < 0 or self.noise < 0:
            raise ValueError("temperature and noise must not be negative")
