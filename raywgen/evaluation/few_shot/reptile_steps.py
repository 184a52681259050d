"""Measures how well a Reptile start adapts, by the number of steps.

Shape legend: B episodes, K numbers of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from raywgen.evaluation.few_shot.errors import FewShotError
from raywgen.evaluation.few_shot.heads import accuracy
from raywgen.evaluation.few_shot.reptile import Learner, Prepare, ReptileState, minibatches
from raywgen.tasks.episodes import Episode, EpisodeSampler

STEPS = (1, 2, 3, 5, 8, 12, 20, 30, 50)


def accuracy_by_steps(
    learners: Sequence[Learner],
    start: ReptileState,
    sampler: EpisodeSampler,
    *,
    prepare: Prepare,
    num_episodes: int,
    first: int = 0,
    num_steps: Sequence[int] = STEPS,
    transductive: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Adapts to each episode and looks at its queries after each number of steps.

    Args:
        learners: One for each thread that shares the work; they do not change the result.
        start: What `train_reptile` gave.
        sampler: Episodes.
        prepare: From pixels to the network's inputs.
        num_episodes: B.
        first: Index of the first of them.
        num_steps: K ascending numbers of Adam steps.
        transductive: Normalise queries by themselves instead of by the support set.
        on_progress: Called with episodes done and to do.

    Returns:
        Accuracy on the queries `(B, K)` in [0, 1].

    Raises:
        FewShotError: The numbers of steps do not ascend from 0 or above, or there is nothing to look at.
    """
    steps = [int(number) for number in num_steps]
    if not learners or num_episodes < 1 or not steps or steps != sorted(set(steps)) or steps[0] < 0:
        raise FewShotError(
            f"{len(learners)} learners, num_episodes={num_episodes}, num_steps={steps}: give at least one of each, and "
            "steps in ascending order, none negative"
        )

    def judge(share: int) -> list[list[float]]:
        learner, rows = learners[share], []
        for index in range(first + share, first + num_episodes, len(learners)):
            rows.append(_by_steps(learner, start, sampler.episode(index), prepare, steps, transductive))
            if on_progress is not None:
                on_progress(min(len(rows) * len(learners), num_episodes), num_episodes)
        return rows

    with ThreadPoolExecutor(len(learners)) as pool:
        parts = list(pool.map(judge, range(len(learners))))
    return torch.tensor([parts[i % len(learners)][i // len(learners)] for i in range(num_episodes)])


def fewest_steps(accuracy_BK: Tensor, num_steps: Sequence[int], *, within: float = 0.003) -> int:
    """The smallest of the numbers of steps whose mean accuracy lies within so much of the best one's.

    Args:
        accuracy_BK: What `accuracy_by_steps` gave on validation episodes.
        num_steps: The same K numbers.
        within: As a share: 0.003 are 0.3 points.
    """
    mean_K = accuracy_BK.double().mean(dim=0)
    near_K = mean_K >= mean_K.max() - within
    return min(steps for steps, near in zip(num_steps, near_K.tolist(), strict=True) if near)


def _by_steps(
    learner: Learner,
    start: ReptileState,
    episode: Episode,
    prepare: Prepare,
    steps: Sequence[int],
    transductive: bool,
) -> list[float]:
    x, y = learner.taken(prepare(episode.support_x)), episode.support_y.to(learner.device)
    query_x, query_y = learner.taken(prepare(episode.query_x)), episode.query_y.to(learner.device)
    batches = minibatches(len(y), learner.config.eval_batch, steps[-1], seed=learner.config.seed).to(learner.device)
    learner.restart(start)
    accuracies, done = [], 0
    for wanted in steps:
        learner.learn(x, y, batches[done:wanted])
        done = wanted
        if not transductive:
            learner.normalise_by(x)
        accuracies.append(float(accuracy(learner.logits(query_x, transductive=transductive), query_y)))
    return accuracies
