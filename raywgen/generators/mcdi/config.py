"""Config of Mc-Di; what each setting is worth is measured by `jobs/benchmark.py mcdi-ablation`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from raywgen.generators.common.network import MAX_ROWS, NetworkConfig
from raywgen.generators.common.tokenizer import VQVAEConfig
from raywgen.generators.mcdi.local_consistency import Parameterisation, Weighting
from raywgen.generators.mcdi.samplers import Sampler
from raywgen.generators.mcdi.schedule import Schedule, ScheduleKind
from raywgen.generators.settings import GeneratorConfig, OptimizerConfig, Sampling, StageConfig

Targets = Literal["consistent", "naive"]
Spans = Literal["own", "whole"]
Meta = Literal["reptile", "joint"]


@dataclass(kw_only=True)
class DiffusionConfig:
    """The chain from noise to weights.

    Attributes:
        num_steps: T, the number of steps of the chain.
        num_targets: k, the number of local targets along each trajectory; 1 is vanilla diffusion (the paper's Mv-Di).
        targets: Chain that a local target ends: with `consistent` a local chain of its own (Mc-Di), with `naive` the
            whole chain (the paper's Tw-Di).
        spans: Steps that a local chain is trained on: `own`: those after the local target before it, so that no two
            chains ask for different weights in the same state; `whole`: all before its end, as in the paper.
        schedule: Noise schedule, `cosine` or `linear`.
        parameterisation: Prediction of the denoiser, `weights` or `noise`.
        weighting: Weighting of the loss over time: `local`, `paper`, `noise` or `weights`.
    """

    num_steps: int = 20
    num_targets: int = 3
    targets: Targets = "consistent"
    spans: Spans = "own"
    schedule: ScheduleKind = "cosine"
    parameterisation: Parameterisation = "weights"
    weighting: Weighting = "local"

    def __post_init__(self) -> None:
        self.chain()

    def chain(self) -> Schedule:
        """Returns the chain of these settings."""
        return Schedule.make(self.schedule, self.num_steps, self.num_targets)


@dataclass(frozen=True, kw_only=True)
class McDiSampling(Sampling):
    """The settings by which the chain is walked.

    Attributes:
        sampler: Kind of sampling step: `mean`, `stochastic` or `deterministic`.
        num_steps: Number of evaluations of the denoiser, at most `diffusion.num_steps`.
        max_rows: Most windows of all networks that are written at once if networks are longer than `network.window`;
            bounds the memory and changes nothing else.
    """

    sampler: Sampler = "mean"
    num_steps: int = 20
    max_rows: int = MAX_ROWS

    def __post_init__(self) -> None:
        if self.max_rows < 1:
            raise ValueError(f"max_rows={self.max_rows}: must be at least 1")


@dataclass(kw_only=True)
class DenoiserConfig(StageConfig):
    """The settings by which the denoiser is meta-trained.

    Attributes:
        meta: Meta-learning: `reptile`, or `joint` for ordinary training on all tasks at once.
        inner_rate: Reptile's rate within a task (eta).
        inner_steps: Number of Reptile's steps within a task (K).
        num_draws: Number of noised versions of one local target in a step.
    """

    num_steps: int = 1000
    batch_size: int = 64
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(weight_decay=0.0))
    meta: Meta = "reptile"
    inner_rate: float = 0.005
    inner_steps: int = 3
    num_draws: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.inner_steps, self.num_draws) < 1 or self.inner_rate <= 0:
            raise ValueError("inner_steps and num_draws: at least 1; inner_rate: above 0")


@dataclass(kw_only=True)
class McDiTaskLossConfig(StageConfig):
    """A few steps through a short sampler by the task's own loss; `num_steps=0` switches it off.

    Attributes:
        sampling_steps: Number of steps of the sampler that is trained through.
        consistency: Weight of the local consistency loss that is kept beside the task's loss.
    """

    num_steps: int = 0
    batch_size: int = 64
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=3e-4, weight_decay=0.0))
    sampling_steps: int = 2
    consistency: float = 0.1


@dataclass(kw_only=True)
class McDiConfig(GeneratorConfig):
    """The settings of Mc-Di.

    Attributes:
        diffusion: The chain.
        network: Kind and sizes of the denoiser.
        denoiser: The stage that trains the denoiser on local targets.
        task_loss: The stage that trains the denoiser by the task's loss.
        sampling: Sampling settings of requests that give none; the task-loss stage uses their sampler.
        tokenizer: The tokeniser, which is trained first if `network.kind` is `latents`; a latent stands for its
            `chunk_length` values.
    """

    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    task_loss: McDiTaskLossConfig = field(default_factory=McDiTaskLossConfig)
    sampling: McDiSampling = field(default_factory=McDiSampling)
    tokenizer: VQVAEConfig = field(default_factory=lambda: VQVAEConfig(chunk_length=128))

    def __post_init__(self) -> None:
        self.diffusion.chain().steps(self.sampling.num_steps)
        if self.task_loss.num_steps > 0:
            self.diffusion.chain().steps(self.task_loss.sampling_steps, "task_loss.sampling_steps")
