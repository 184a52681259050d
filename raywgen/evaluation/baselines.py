"""Baselines of a generator; each gives up to n candidates per task and gets the same condition as the generator.

Shape letters beyond the legend in `raywgen.weights`: T tasks, n candidates of a task, R stored networks.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from raywgen.evaluation.config import EvaluateConfig
from raywgen.evaluation.stored_networks import CoordinateMoments
from raywgen.evaluation.task_evaluator import TaskEvaluator
from raywgen.tasks import FitConfig, FitData, Recorded, build_network, fit
from raywgen.training.stored_weights import whole_blocks

_WORD = re.compile(r"\w+")


def random_start(evaluator: TaskEvaluator, config: EvaluateConfig, recipe: dict[str, object]) -> Tensor:
    """Returns fresh initialisations, `(T, n, D)`."""
    with torch.random.fork_rng():
        torch.manual_seed(config.seed + 1)
        fresh = [evaluator.layout.flatten(build_network(recipe).state_dict()) for _ in range(config.best_of)]
    return torch.stack(fresh).expand(len(evaluator.tasks), -1, -1)


def shared_start(evaluator: TaskEvaluator, config: EvaluateConfig) -> Tensor:
    """Returns the start that all networks of the layout share, `(T, 1, D)`."""
    return evaluator.normalizer.base_D.expand(len(evaluator.tasks), 1, -1)


def average(evaluator: TaskEvaluator, config: EvaluateConfig) -> Tensor:
    """Returns the mean of all stored networks, `(T, 1, D)`."""
    moments = CoordinateMoments.measure(evaluator.stored.weights, evaluator.layout.num_values)
    return moments.mean_D.float().expand(len(evaluator.tasks), 1, -1)


def gaussian(evaluator: TaskEvaluator, config: EvaluateConfig) -> Tensor:
    """Draws each coordinate from its own Gaussian over the stored networks, `(T, n, D)`."""
    normalizer = evaluator.normalizer
    # A single stored network has no deviation, so the Gaussian is that network.
    seen = CoordinateMoments.measure(evaluator.stored.weights, evaluator.layout.num_values, normalizer.normalise)
    return normalizer.denormalise(seen.mean_D.float() + seen.deviation_D.float() * _normal(evaluator, config, 2))


def nearest_by_condition(evaluator: TaskEvaluator, config: EvaluateConfig) -> Tensor:
    """Returns the n stored networks whose instructions share most words with the task's, `(T, n, D)`."""
    stored = [_words(text) for text in evaluator.stored.instructions]
    picks = []
    for text in evaluator.condition.instructions:
        wanted = _words(text)
        similarity_R = torch.tensor([len(wanted & words) / len(wanted | words) for words in stored])
        picks.append(similarity_R.argsort(descending=True, stable=True)[: config.best_of])
    return evaluator.stored.values(torch.stack(picks))


def nearest_by_loss(evaluator: TaskEvaluator, config: EvaluateConfig) -> Tensor:
    """Returns the n stored networks with the lowest loss on the task's examples, `(T, n, D)`.

    All R stored networks are tried, which is more than the generator's n candidates.
    """
    return evaluator.stored.values(_best_by_loss(evaluator, config.best_of))


def average_of_best(evaluator: TaskEvaluator, config: EvaluateConfig) -> Tensor:
    """Returns the mean of the n stored networks that fit the examples best, `(T, 1, D)`."""
    return nearest_by_loss(evaluator, config).mean(dim=1, keepdim=True)


def stored_plus_noise(evaluator: TaskEvaluator, config: EvaluateConfig) -> Tensor:
    """Adds noise to the stored network that fits the examples best, `(T, n, D)`."""
    best_T1D = evaluator.stored.values(_best_by_loss(evaluator, 1))
    return evaluator.normalizer.denormalise(
        evaluator.normalizer.normalise(best_T1D) + config.noise * _normal(evaluator, config, 3)
    )


def gradient(evaluator: TaskEvaluator, config: EvaluateConfig) -> Tensor:
    """Fits the shared start to the examples by Adam, in n data orders, `(T, n, D)`."""
    T, n = len(evaluator.tasks), config.best_of
    condition = evaluator.condition.repeat(n)
    (end,) = fit(
        evaluator.module,
        Recorded(step=0, state_N=evaluator.layout.unflatten(evaluator.normalizer.base_D.expand(T * n, -1))),
        FitData(x=condition.samples_BSF, labels_NS=condition.labels_BS),
        FitConfig(
            num_steps=config.gradient_steps,
            batch_size=max(1, condition.labels_BS.shape[1] // 2),
            learning_rate=config.gradient_learning_rate,
        ),
        order_seeds=[config.seed + index for index in range(T * n)],
        record_steps=[config.gradient_steps],
    )
    return _flat(evaluator, end.state_N).view(T, n, -1)


BASELINES: dict[str, Callable[[TaskEvaluator, EvaluateConfig], Tensor]] = {
    "average": average,
    "gaussian": gaussian,
    "nearest_condition": nearest_by_condition,
    "nearest_loss": nearest_by_loss,
    "average_best": average_of_best,
    "noise": stored_plus_noise,
}
SHARED_START_BASELINES: dict[str, Callable[[TaskEvaluator, EvaluateConfig], Tensor]] = {
    "shared_start": shared_start,
    "gradient": gradient,
}
"""Baselines that need a start which all networks share."""


def _flat(evaluator: TaskEvaluator, state: dict[str, Tensor]) -> Tensor:
    return torch.cat([state[spec.name].flatten(1) for spec in evaluator.layout.generated], dim=1)


def _normal(evaluator: TaskEvaluator, config: EvaluateConfig, stream: int) -> Tensor:
    generator = torch.Generator().manual_seed(config.seed * 10 + stream)
    return torch.randn(len(evaluator.tasks), config.best_of, evaluator.layout.num_values, generator=generator)


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.lower()))


def _best_by_loss(evaluator: TaskEvaluator, num: int) -> Tensor:
    """Returns the indices, int64 `(T, n)`, of the stored networks with the lowest loss on each task, best first."""
    num_tasks = len(evaluator.tasks)
    loss_Tn, index_Tn = torch.empty(num_tasks, 0), torch.empty(num_tasks, 0, dtype=torch.int64)
    for index_B, values_BD in whole_blocks(evaluator.stored.weights, evaluator.layout.num_values):
        each = [_only(evaluator, task).example_loss(values_BD.unsqueeze(0))[0] for task in range(num_tasks)]
        loss_Tn = torch.cat([loss_Tn, torch.stack(each)], dim=1)
        index_Tn = torch.cat([index_Tn, index_B.expand(num_tasks, -1)], dim=1)
        order_Tn = loss_Tn.argsort(dim=1, stable=True)[:, :num]
        loss_Tn, index_Tn = loss_Tn.gather(1, order_Tn), index_Tn.gather(1, order_Tn)
    return index_Tn


def _only(evaluator: TaskEvaluator, index: int) -> TaskEvaluator:
    condition = evaluator.condition
    one = replace(
        condition,
        instructions=condition.instructions[index : index + 1],
        samples_BSF=condition.samples_BSF[index : index + 1],
        labels_BS=condition.labels_BS[index : index + 1],
    )
    return replace(evaluator, tasks=evaluator.tasks[index : index + 1], condition=one)
