"""A problem with known answers for balance objectives: paths from the origin to a mixture of two Gaussians.

    P_F(s_{n+1} | s_n) = N(s_n + u(s_n, n / L) / L, 1 / L)        u: a small network
    P_B                = the Brownian bridge back to the origin
    log F(s_0) = log Z, learned; log F(s_L) = log R(s_L) = log 3 + log density of the mixture
    log F(s_n) = log Z + log N(s_n; 0, n / L) + v(s_n, n / L)     v: a small network

Where all residuals vanish, Z is 3 and paths end as the mixture is. Untrained (`u = v = 0`), paths are Brownian motion
that spreads by 1.

Steps of one spread cannot do so exactly: each should be a mixture itself where it is open which mode is meant. What is
left falls as 1 / L.

Shape letters beyond the legend in `raywgen.weights`: B or N paths, L steps (L + 1 states), D coordinates, K = 2 modes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raywgen.generators.lohp.balance import (
    detailed_balance_loss,
    potentials,
    sub_trajectory_balance_loss,
    trajectory_balance_loss,
)
from raywgen.generators.lohp.kernels import bridge_log_prob, forward_log_prob, sample_bridge

OBJECTIVES = ("sub_trajectory", "trajectory", "detailed")
LOG_Z = math.log(3)
# log Z is one number far from its answer, moved by at most about its rate in a step of Adam.
_LOG_Z_RATE = 10
# log Z may pass by its answer on the way to somewhere else.
_LOOKS = 4


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Two modes, at `mode` and `-mode`.

    Attributes:
        mode: Position of the first mode.
        weight: Weight of the first mode.
        std: Standard deviation of each mode and coordinate.
    """

    mode: tuple[float, ...] = (1.0, 0.6)
    weight: float = 0.3
    std: float = 0.7

    @property
    def mean(self) -> Tensor:
        """Mean of the mixture, `(D,)`."""
        return (2 * self.weight - 1) * torch.tensor(self.mode)

    @property
    def covariance(self) -> Tensor:
        """Covariance of the mixture, `(D, D)`."""
        mode_D = torch.tensor(self.mode)
        between = 4 * self.weight * (1 - self.weight)
        return self.std**2 * torch.eye(len(mode_D)) + between * torch.outer(mode_D, mode_D)

    def log_reward(self, x: Tensor) -> Tensor:
        """Returns `log 3 + log density`, `(...)`."""
        return LOG_Z + self._joint(x).logsumexp(dim=-1)

    def weight_of(self, x: Tensor) -> float:
        """Returns the mean probability of the first mode given x; `weight` if x was drawn from the mixture."""
        return float(self._joint(x).softmax(dim=-1)[..., 0].mean())

    def sample(self, num: int, generator: torch.Generator, weight: float | None = None) -> Tensor:
        """Draws samples `(N, D)`, with another weight of the first mode if one is given."""
        is_first_N1 = torch.rand(num, 1, generator=generator) < (self.weight if weight is None else weight)
        noise_ND = torch.randn(num, len(self.mode), generator=generator)
        return torch.where(is_first_N1, 1.0, -1.0) * torch.tensor(self.mode) + self.std * noise_ND

    def _joint(self, x: Tensor) -> Tensor:
        """Returns the joint log density of mode and position, `(..., K)`."""
        mode_D = torch.tensor(self.mode)
        mean_KD = torch.stack([mode_D, -mode_D])
        log_prob = forward_log_prob(x.unsqueeze(-2), mean_KD, torch.zeros(()), self.std).sum(dim=-1)
        return log_prob + torch.tensor([self.weight, 1 - self.weight]).log()


class Balance(nn.Module):
    """The model: policy, flow and normaliser.

    Attributes:
        mixture: The rewarded distribution.
        length: Steps of a path, L.
        sigma: Standard deviation of one step.
    """

    def __init__(self, mixture: Mixture, length: int, width: int, seed: int) -> None:
        super().__init__()
        self.mixture, self.length = mixture, length
        self.sigma = length**-0.5
        D = len(mixture.mode)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.policy, self.flow = _mlp(D + 1, width, D), _mlp(D + 1, width, 1)
        self.log_z = nn.Parameter(torch.zeros(()))

    def drift(self, x: Tensor, n: Tensor) -> Tensor:
        """Returns the mean step from states `(..., D)`; n broadcasts to `(..., 1)`."""
        return self.policy(self._inputs(x, n)) / self.length

    @torch.no_grad()
    def roll_out(self, num: int, generator: torch.Generator, exploration: float = 0.0) -> Tensor:
        """Samples paths of the policy, `(N, L + 1, D)`.

        Args:
            num: Number of paths, N.
            generator: Generator of their noise.
            exploration: Extra spread of each step, as a share of the policy's own.
        """
        noise_LND = torch.randn(self.length, num, len(self.mixture.mode), generator=generator)
        states = [torch.zeros_like(noise_LND[0])]
        for n, noise_ND in enumerate(noise_LND):
            mean_ND = states[-1] + self.drift(states[-1], torch.tensor(n))
            states.append(mean_ND + self.sigma * (1 + exploration) * noise_ND)
        return torch.stack(states, dim=1)

    @torch.no_grad()
    def bridges(self, num: int, generator: torch.Generator, weight: float | None = None) -> Tensor:
        """Samples paths of the backward policy from samples of the mixture, `(N, L + 1, D)`; see `Mixture.sample`."""
        end_ND = self.mixture.sample(num, generator, weight)
        noise_NLD = torch.randn(num, self.length - 1, end_ND.shape[-1], generator=generator)
        return sample_bridge(torch.zeros_like(end_ND), end_ND, self.length, self.sigma, noise_NLD)

    def potentials(self, states_BLD: Tensor) -> Tensor:
        """Returns the potentials of paths, `(B, L + 1)`."""
        x_BLD, next_BLD, start_B1D = states_BLD[:, :-1], states_BLD[:, 1:], states_BLD[:, :1]
        n_L1 = torch.arange(self.length).unsqueeze(-1)
        log_forward = forward_log_prob(next_BLD, x_BLD, self.drift(x_BLD, n_L1), self.sigma)
        log_backward = bridge_log_prob(x_BLD, next_BLD, start_B1D, n_L1, self.sigma)
        log_flow = [
            self.log_z.expand(len(states_BLD), 1),
            self._log_flow(x_BLD[:, 1:], n_L1[1:]),
            self.mixture.log_reward(states_BLD[:, -1:]),
        ]
        return potentials(torch.cat(log_flow, dim=1), log_forward.sum(dim=-1), log_backward.sum(dim=-1))

    def _log_flow(self, x_BLD: Tensor, n_L1: Tensor) -> Tensor:
        """Returns the log flow of the states between the first and the last."""
        zero = torch.zeros(())
        motion_BL = forward_log_prob(x_BLD, zero, zero, self.sigma * n_L1.sqrt()).sum(dim=-1)
        return self.log_z + motion_BL + self.flow(self._inputs(x_BLD, n_L1)).squeeze(-1)

    def _inputs(self, x: Tensor, n: Tensor) -> Tensor:
        return torch.cat([x, (n / self.length).expand(*x.shape[:-1], 1)], dim=-1)


def _mlp(inputs: int, width: int, outputs: int) -> nn.Module:
    last = nn.Linear(width, outputs)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), last)


@dataclass(frozen=True, kw_only=True)
class Training:
    """Settings of the training of a `Balance`.

    Attributes:
        objective: `sub_trajectory`, `trajectory` or `detailed`.
        lam: Geometric weight of a longer window in sub-trajectory balance.
        mix: Share of off-policy paths.
        off_policy_weight: Weight of the first mode among ends of off-policy paths; as in the mixture by default.
        num_steps: Gradient steps.
        batch_size: Paths of each.
        learning_rate: Learning rate of the networks, by Adam.
        decay: Let the rate fall to zero, linearly.
        exploration: Extra spread of rollouts at first, as a share of the policy's own; gone half way through.
        seed: Seed of all paths.
    """

    objective: str = "sub_trajectory"
    lam: float = 0.9
    mix: float = 0.0
    off_policy_weight: float | None = None
    num_steps: int = 400
    batch_size: int = 64
    learning_rate: float = 5e-3
    decay: bool = False
    exploration: float = 0.2
    seed: int = 0

    def loss(self, g: Tensor) -> Tensor:
        """Returns the loss at the potentials of some paths."""
        match self.objective:
            case "detailed":
                return detailed_balance_loss(g)
            case "trajectory":
                return trajectory_balance_loss(g)
            case _:
                assert self.objective == "sub_trajectory", self.objective
                return sub_trajectory_balance_loss(g, self.lam)


def train(model: Balance, training: Training) -> Iterator[int]:
    """Trains in place and yields the number of steps done after each, so that a caller may look and stop."""
    generator = torch.Generator().manual_seed(training.seed)
    networks = [*model.policy.parameters(), *model.flow.parameters()]
    rate = training.learning_rate
    groups = [{"params": networks, "lr": rate}, {"params": [model.log_z], "lr": _LOG_Z_RATE * rate}]
    optimizer = torch.optim.Adam(groups)
    last = training.num_steps if training.decay else math.inf
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / last)
    for step in range(training.num_steps):
        left = max(0.0, 1 - 2 * step / training.num_steps)
        loss = _hybrid(model, training, generator, training.exploration * left)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        yield step + 1


def _hybrid(model: Balance, training: Training, generator: torch.Generator, exploration: float) -> Tensor:
    num_off = round(training.mix * training.batch_size)
    parts = []
    if num_off < training.batch_size:
        parts.append(model.roll_out(training.batch_size - num_off, generator, exploration))
    if num_off:
        parts.append(model.bridges(num_off, generator, training.off_policy_weight))
    return training.loss(model.potentials(torch.cat(parts)))


@dataclass(frozen=True, kw_only=True)
class Errors:
    """The errors of a model against the known answers.

    Attributes:
        log_z: Absolute error of the learned `log Z`.
        weight: Absolute error of the share of the first mode among samples.
        energy: Energy distance of samples to the mixture, estimated without bias; may fall below zero.
    """

    log_z: float
    weight: float
    energy: float


def errors(model: Balance, num_samples: int, seed: int) -> Errors:
    """Measures the errors of a model with `num_samples` paths of its policy."""
    generator = torch.Generator().manual_seed(seed)
    samples_ND = model.roll_out(num_samples, generator)[:, -1]
    return Errors(
        log_z=abs(model.log_z.item() - LOG_Z),
        weight=abs(model.mixture.weight_of(samples_ND) - model.mixture.weight),
        energy=energy_distance(samples_ND, model.mixture.sample(num_samples, generator)),
    )


def energy_distance(x_ND: Tensor, y_ND: Tensor) -> float:
    """Estimates `2 E|x - y| - E|x - x'| - E|y - y'|` without bias, from equally many samples of both."""
    N = len(x_ND)
    within = (torch.cdist(x_ND, x_ND).sum() + torch.cdist(y_ND, y_ND).sum()) / (N * (N - 1))
    return float(2 * torch.cdist(x_ND, y_ND).mean() - within)


def steps_until(
    model: Balance, training: Training, is_good: Callable[[Errors], bool], *, every: int, num_samples: int = 1000
) -> int:
    """Counts gradient steps until a model is good for `_LOOKS` measurements in a row; all steps if it never is.

    Args:
        model: Model that is trained in place.
        training: Settings of the training.
        is_good: Says whether errors are small enough.
        every: Steps between measurements.
        num_samples: Paths of a measurement.
    """
    good = 0
    for step in train(model, training):
        if step % every == 0:
            good = good + 1 if is_good(errors(model, num_samples, seed=step)) else 0
            if good == _LOOKS:
                return step - (_LOOKS - 1) * every
    return training.num_steps


def snapshots(model: Balance, training: Training, steps: tuple[int, ...]) -> list[Balance]:
    """Returns copies of the model after these numbers of steps; 0 is before training."""
    copies = [copy.deepcopy(model)] if 0 in steps else []
    return copies + [copy.deepcopy(model) for step in train(model, training) if step in steps]
