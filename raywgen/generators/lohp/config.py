"""Config of Lo-Hp; the paper's own settings could not be read, so the defaults are ours."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from raywgen.generators.common.network import MAX_ROWS, NetworkConfig
from raywgen.generators.settings import GeneratorConfig, OptimizerConfig, Sampling, StageConfig

Objective = Literal["sub_trajectory", "trajectory", "detailed", "cloning"]
Hybrid = Literal["mixed", "spliced"]
Flow = Literal["factored", "joint"]
Backward = Literal["bridge", "learned"]


@dataclass(kw_only=True)
class PathConfig:
    """The path of states from the start of an optimisation to its end.

    Attributes:
        num_steps: T, the number of steps of the whole path.
        length: Number of steps of a sub-trajectory, which leads from one local target to the next; divides `num_steps`.
        noise: Spread of the states that a local target rewards, in units of each tensor's scale; a sub-trajectory of
            the forward policy spreads as much.
    """

    num_steps: int = 12
    length: int = 4
    noise: float = 1.0

    def __post_init__(self) -> None:
        if min(self.num_steps, self.length) < 1 or self.num_steps % self.length:
            raise ValueError(f"length={self.length}: must divide num_steps={self.num_steps}")
        if not self.noise > 0:
            raise ValueError(f"noise={self.noise}: must be above 0")

    @property
    def num_targets(self) -> int:
        """Returns k, the number of local targets of a trajectory."""
        return self.num_steps // self.length

    @property
    def sigma(self) -> float:
        """Returns the spread of one step."""
        return self.noise / self.length**0.5


@dataclass(frozen=True, kw_only=True)
class LoHpSampling(Sampling):
    """The settings by which the policy is followed.

    Attributes:
        num_steps: Number of evaluations of the policy, a multiple of the number of sub-trajectories and at most
            `path.num_steps`.
        max_rows: Most windows of all networks that are written at once if networks are longer than `network.window`;
            bounds the memory and changes nothing else.
    """

    num_steps: int = 3
    max_rows: int = MAX_ROWS

    def __post_init__(self) -> None:
        if self.max_rows < 1:
            raise ValueError(f"max_rows={self.max_rows}: must be at least 1")


@dataclass(kw_only=True)
class PolicyConfig(StageConfig):
    """The balance that forward policy, backward policy and flow are trained for.

    Attributes:
        objective: Loss: `sub_trajectory` (SubTB), `trajectory` or `detailed` balance, or `cloning` of stored steps.
        lam: Geometric weight of a longer window in sub-trajectory balance (lambda).
        mix: Share of off-policy paths, from stored trajectories; 0 is on-policy alone, 1 off-policy alone.
        hybrid: Combination of both: `mixed` has whole paths of either, `spliced` stored sub-trajectories in rollouts.
        flow: Form of the flow: `factored` over coordinates, each of which balances by itself, or `joint`: one balance
            for all coordinates of a network or window.
        backward: Backward policy: a fixed `bridge`, or a `learned` one that begins as the bridge.
        exploration: Extra spread of rollouts at the first step, as a share of the policy's own.
        exploration_steps: Number of optimiser steps until `exploration` has fallen to 0.
        replay_size: Number of batches of past rollouts that are kept, also in checkpoints, and drawn from.
        task_reward: Weight of the task's loss in the reward of a path's end; 0 leaves tasks out of training. Above 0
            networks must not be longer than `network.window`.
    """

    num_steps: int = 600
    batch_size: int = 64
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(weight_decay=0.0))
    objective: Objective = "sub_trajectory"
    lam: float = 0.9
    mix: float = 0.5
    hybrid: Hybrid = "mixed"
    flow: Flow = "factored"
    backward: Backward = "bridge"
    exploration: float = 0.2
    exploration_steps: int = 300
    replay_size: int = 0
    task_reward: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.mix <= 1 or not self.lam > 0:
            raise ValueError(f"mix={self.mix}, lam={self.lam}: mix lies between 0 and 1, lam is above 0")
        if min(self.exploration, self.exploration_steps, self.replay_size, self.task_reward) < 0:
            raise ValueError("exploration, exploration_steps, replay_size and task_reward: must be at least 0")


@dataclass(kw_only=True)
class LoHpTaskLossConfig(StageConfig):
    """Training of the policy through its own path by the task's own loss; `num_steps=0` switches it off.

    The path has as many steps as `sampling.num_steps`, and is the mean unless `temperature` is above 0. The stage needs
    no trajectories: with `policy.num_steps=0` it is the only stage.

    Attributes:
        temperature: Spread of the path's steps, as in generation.
    """

    num_steps: int = 0
    batch_size: int = 64
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(weight_decay=0.0))
    temperature: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature}: must be at least 0")


@dataclass(kw_only=True)
class LoHpConfig(GeneratorConfig):
    """The settings of Lo-Hp.

    Attributes:
        path: The path of states.
        network: Kind and sizes of the networks of policy and flow.
        policy: The stage that trains policy and flow.
        task_loss: The stage that trains the policy by the task's loss.
        sampling: Sampling settings of requests that give none.
    """

    path: PathConfig = field(default_factory=PathConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    task_loss: LoHpTaskLossConfig = field(default_factory=LoHpTaskLossConfig)
    sampling: LoHpSampling = field(default_factory=LoHpSampling)

    def __post_init__(self) -> None:
        path, num_steps = self.path, self.sampling.num_steps
        if num_steps < 1 or num_steps % path.num_targets or num_steps > path.num_steps:
            raise ValueError(
                f"sampling.num_steps={num_steps}: give a multiple of path.num_steps / path.length={path.num_targets}, "
                f"at most path.num_steps={path.num_steps}"
            )
