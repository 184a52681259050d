"""Measures how well a Reptile start adapts, by the number of steps.

Shape letters beyond the legend in `raywgen.weights`: B episodes, K numbers of steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from raywgen.evaluation.few_shot.errors import FewShotError
from raywgen.evaluation.few_shot.heads import accuracy
from raywgen.evaluation.few_shot.reptile import Learner, Prepare, ReptileState, minibatches
from raywgen.tasks.episodes import Episode, EpisodeSampler

_TOLERANCE = 0.003
STEPS = (1, 2, 3, 5, 8, 12, 20, 30, 50)


def accuracy_by_steps(
    learners: Sequence[Learner],
    start: ReptileState,
    sampler: EpisodeSampler,
    *,
    prepare: Prepare,
    num_episodes: int,
    num_steps: Sequence[int] = STEPS,
) -> Tensor:
    """Adapts to each episode and classifies its queries after each number of steps.

    Args:
        learners: One for each thread that shares the work; they do not change the result.
        start: A start from `train_reptile`.
        sampler: Episodes.
        prepare: Turns pixels into the network's inputs.
        num_episodes: B.
        num_steps: K ascending numbers of Adam steps.

    Returns:
        Accuracy on the queries `(B, K)` in [0, 1].

    Raises:
        FewShotError: The numbers of steps do not ascend from 0 or above, or there are no episodes.
    """
    steps = [int(number) for number in num_steps]
    if not learners or num_episodes < 1 or not steps or steps != sorted(set(steps)) or steps[0] < 0:
        raise FewShotError(
            f"{len(learners)} learners, num_episodes={num_episodes}, num_steps={steps}: give at least one of each, and "
            "steps in ascending order, none negative"
        )

    def judge(share: int) -> list[list[float]]:
        episodes = (sampler.episode(index) for index in range(share, num_episodes, len(learners)))
        return [_by_steps(learners[share], start, episode, prepare, steps) for episode in episodes]

    with ThreadPoolExecutor(len(learners)) as pool:
        parts = list(pool.map(judge, range(len(learners))))
    return torch.tensor([parts[i % len(learners)][i // len(learners)] for i in range(num_episodes)])


def fewest_steps(accuracy_BK: Tensor, num_steps: Sequence[int]) -> int:
    """Returns the smallest number of steps whose mean accuracy is within 0.3 percentage points of the best.

    Args:
        accuracy_BK: Result of `accuracy_by_steps` on validation episodes.
        num_steps: The same K numbers.
    """
    mean_K = accuracy_BK.double().mean(dim=0)
    near_K = mean_K >= mean_K.max() - _TOLERANCE
    return min(steps for steps, near in zip(num_steps, near_K.tolist(), strict=True) if near)


def _by_steps(
    learner: Learner,
    start: ReptileState,
    episode: Episode,
    prepare: Prepare,
    steps: Sequence[int],
) -> list[float]:
    x, y = learner.taken(prepare(episode.support_x)), episode.support_y.to(learner.device)
    query_x, query_y = learner.taken(prepare(episode.query_x)), episode.query_y.to(learner.device)
    batches = minibatches(len(y), learner.config.eval_batch, steps[-1], seed=learner.config.seed).to(learner.device)
    learner.restart(start)
    accuracies, done = [], 0
    for wanted in steps:
        learner.learn(x, y, batches[done:wanted])
        done = wanted
        learner.normalise_by(x)
        accuracies.append(float(accuracy(learner.logits(query_x), query_y)))
    return accuracies
