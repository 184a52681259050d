"""Compares sub-trajectory, trajectory and detailed balance over a long horizon, on a problem with known answers.

All begin with the same networks and roll out their own paths (on-policy). Each uses the learning rate of a short list
that was best on seeds reserved for this choice. Figures:

- `steps_*`: gradient steps until samples of the policy and log Z are good, at most `max_steps`.
- `gradient_variance_*`: of the policy's gradient, summed over its parameters and divided by the squared norm of its
  mean, over fresh batches. Both objectives see the same parameters and batches. The mean is that of finitely many
  batches, whose own noise bounds the figure by their number: if anything, the larger figure is underestimated.
  `_at_N` is after N gradient steps of sub-trajectory balance; without it, the mean over those points.
- `steps_on_policy`, `steps_off_policy`, `steps_hybrid`: gradient steps of sub-trajectory balance on a short path and a
  milder mixture, from its own paths, from those of the mixture's samples, and from half of each.
- `steps_ratio_*` and `gradient_variance_ratio*`: the other objective's figure by that of sub-trajectory balance.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from raywgen.benchmarks.recipes import over_seeds
from raywgen.benchmarks.toy_mixture import OBJECTIVES, Balance, Errors, Mixture, Training, snapshots, steps_until

_COMPARED = ("sub_trajectory", "trajectory")
_SOURCES = {"on_policy": 0.0, "off_policy": 1.0, "hybrid": 0.5}
_SHORT, _SHORT_WIDTH, _SHORT_BATCH, _SHORT_RATE = 10, 48, 128, 0.01


@dataclass(kw_only=True)
class LoHpHorizonConfig:
    """The objectives to compare, and the problem.

    Attributes:
        length: Steps of a path (T).
        mode: Position of one mode; the other lies opposite.
        weight: Weight of the first mode.
        std: Standard deviation of a mode.
        lam: Geometric weight of a longer window in sub-trajectory balance.
        width: Width of all networks.
        batch_size: Paths of a gradient step.
        exploration: Extra spread of rollouts at first, as a share of the policy's own.
        learning_rates: Learning rates to choose from, for each objective.
        validation_seeds: Number of seeds for this choice.
        seeds: Number of other seeds; figures are means over them.
        seed: The first of these.
        max_steps: Gradient steps after which training ends anyway.
        every: Gradient steps between two measurements of the errors.
        num_samples: Paths of a measurement.
        good_energy: Energy distance to the mixture below which a model is good.
        good_log_z: Error of log Z below which a model is good.
        gradient_points: Gradient steps of sub-trajectory balance after which gradients are compared.
        gradient_batches: Batches of each comparison.
    """

    length: int = 100
    mode: list[float] = field(default_factory=lambda: [1.5, 0.9])
    weight: float = 0.3
    std: float = 0.6
    lam: float = 0.9
    width: int = 32
    batch_size: int = 32
    exploration: float = 0.0
    learning_rates: list[float] = field(default_factory=lambda: [0.003, 0.01, 0.03])
    validation_seeds: int = 1
    seeds: int = 3
    seed: int = 0
    max_steps: int = 500
    every: int = 10
    num_samples: int = 1000
    good_energy: float = 0.03
    good_log_z: float = 0.2
    gradient_points: list[int] = field(default_factory=lambda: [0, 30, 100])
    gradient_batches: int = 64

    @property
    def counted(self) -> range:
        """Seeds over which figures are averaged."""
        return range(self.seed, self.seed + self.seeds)

    @property
    def choosing(self) -> range:
        """Seeds by which learning rates are chosen."""
        return range(self.seed + self.seeds, self.seed + self.seeds + self.validation_seeds)


def measure(config: LoHpHorizonConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Chooses learning rates, then counts steps and compares gradients for every seed."""
    # Threads cost such small networks more than they gain.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rates = {objective: _best_rate(config, objective) for objective in OBJECTIVES}
        rows = [_one_seed(config, rates, seed) for seed in config.counted]
    finally:
        torch.set_num_threads(before)
    figures, spreads = over_seeds([steps | variances for steps, variances in rows])
    for other in ("trajectory", "detailed"):
        figures[f"steps_ratio_{other}"] = figures[f"steps_{other}"] / figures["steps_sub_trajectory"]
    for at in ("", *(f"_at_{step}" for step in config.gradient_points)):
        ours, other = (figures[f"gradient_variance_{objective}{at}"] for objective in _COMPARED)
        figures[f"gradient_variance_ratio{at}"] = other / ours
    conditions = {"learning_rates": rates, "spread_over_seeds": spreads, "config": dataclasses.asdict(config)}
    capped = {name: sum(steps[name] == config.max_steps for steps, _ in rows) for name in rows[0][0]}
    return figures, conditions | {"never_good": capped, "cores": os.cpu_count(), "torch": torch.__version__}


def gradient_variances(model: Balance, trainings: list[Training], num_batches: int, seed: int) -> list[float]:
    """Returns the variance of the policy's gradient over the squared norm of its mean, for each objective.

    Args:
        model: Model whose policy rolls out the batches and is differentiated.
        trainings: The objectives, with equal batch sizes; all see the same batches.
        num_batches: Number of batches.
        seed: Seed of the batches.
    """
    generator = torch.Generator().manual_seed(seed)
    gradients: list[list[Tensor]] = [[] for _ in trainings]
    for _ in range(num_batches):
        g = model.potentials(model.roll_out(trainings[0].batch_size, generator))
        for training, found in zip(trainings, gradients, strict=True):
            parts = torch.autograd.grad(training.loss(g), list(model.policy.parameters()), retain_graph=True)
            found.append(torch.cat([part.flatten() for part in parts]))
    stacked = [torch.stack(found) for found in gradients]
    return [float(each.var(dim=0).sum() / each.mean(dim=0).square().sum()) for each in stacked]


def _one_seed(config: LoHpHorizonConfig, rates: dict[str, float], seed: int) -> tuple[dict[str, int], dict[str, float]]:
    steps = {f"steps_{objective}": _steps(config, objective, rates[objective], seed) for objective in OBJECTIVES}
    steps |= {f"steps_{source}": steps_from(mix, seed, config.max_steps) for source, mix in _SOURCES.items()}
    variances: dict[str, list[float]] = {objective: [] for objective in _COMPARED}
    trainings = [_training(config, objective, rates[objective], seed) for objective in _COMPARED]
    path = dataclasses.replace(trainings[0], num_steps=max(config.gradient_points))
    for model in snapshots(_untrained(config, seed), path, tuple(config.gradient_points)):
        found = gradient_variances(model, trainings, config.gradient_batches, seed)
        for objective, variance in zip(_COMPARED, found, strict=True):
            variances[objective].append(variance)
    figures = {f"gradient_variance_{objective}": mean(each) for objective, each in variances.items()}
    for i, step in enumerate(config.gradient_points):
        figures |= {f"gradient_variance_{objective}_at_{step}": variances[objective][i] for objective in _COMPARED}
    return steps, figures


def steps_from(mix: float, seed: int, max_steps: int) -> int:
    """Counts gradient steps until log Z is known to 0.1 and the weight of a mode to 0.05.

    Args:
        mix: Share of off-policy paths.
        seed: Seed of everything.
        max_steps: Gradient steps after which training ends anyway.
    """

    def is_good(found: Errors) -> bool:
        return found.log_z < 0.1 and found.weight < 0.05

    model = Balance(Mixture(), _SHORT, _SHORT_WIDTH, seed)
    training = Training(mix=mix, batch_size=_SHORT_BATCH, learning_rate=_SHORT_RATE, num_steps=max_steps, seed=seed)
    return steps_until(model, training, is_good, every=10)


def _best_rate(config: LoHpHorizonConfig, objective: str) -> float:
    """Returns the learning rate that needs the fewest steps, the smallest of equals."""
    return min(
        sorted(config.learning_rates),
        key=lambda rate: sum(_steps(config, objective, rate, seed) for seed in config.choosing),
    )


def _steps(config: LoHpHorizonConfig, objective: str, rate: float, seed: int) -> int:
    def is_good(found: Errors) -> bool:
        return found.energy < config.good_energy and found.log_z < config.good_log_z

    training = _training(config, objective, rate, seed)
    return steps_until(_untrained(config, seed), training, is_good, every=config.every, num_samples=config.num_samples)


def _untrained(config: LoHpHorizonConfig, seed: int) -> Balance:
    mixture = Mixture(mode=tuple(config.mode), weight=config.weight, std=config.std)
    return Balance(mixture, config.length, config.width, seed)


def _training(config: LoHpHorizonConfig, objective: str, rate: float, seed: int) -> Training:
    return Training(
        objective=objective,
        lam=config.lam,
        num_steps=config.max_steps,
        batch_size=config.batch_size,
        learning_rate=rate,
        exploration=config.exploration,
        seed=seed,
    )
