"""Turns what is known of a task before any network is trained for it into numbers that a regression can use.

Three groups, each left out where the user gives nothing that it needs:

- Landmarks, from labelled samples: the leave-one-out accuracy of cheap classifiers, number of classes and their balance
  (landmarking: Pfahringer, Bensusan and Giraud-Carrier, ICML 2000).
- Data: mean and standard deviation of each feature and, with labels, the spread of the class means.
- Text: the instruction's word vector.

Each group weighs the same, however many numbers it has. Scales and word weights come from the tasks given to `fit`
alone, so that tasks left out stay unknown.

Shape letters beyond the legend in `raywgen.weights`: T tasks, E numbers of a task.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from torch import Tensor

from raywgen.evaluation.request import TaskRequest
from raywgen.evaluation.task_similarity import word_vectors

if TYPE_CHECKING:
    from sklearn.preprocessing import StandardScaler

_RIDGE = 1e-2


class TaskFeatures:
    """Numeric features `(T, E)` of tasks.

    Args:
        like: The user's task; what it lacks (instruction, samples, labels) is used of no other task either.
    """

    def __init__(self, like: TaskRequest) -> None:
        self._has_text = bool(like.instruction)
        self._has_data = like.samples_SF is not None
        self._has_labels = like.labels_S is not None
        self._words = word_vectors()
        self._scales: list[StandardScaler] = []

    def fit(self, tasks: Sequence[TaskRequest]) -> Self:
        """Takes word weights and scales from these tasks."""
        from sklearn.preprocessing import StandardScaler  # Late, as in `raywgen.tasks.digits`.

        if self._has_text:
            self._words.fit([task.instruction for task in tasks])
        self._scales = [StandardScaler().fit(group_TE) for group_TE in self._groups(tasks)]
        return self

    def transform(self, tasks: Sequence[TaskRequest]) -> np.ndarray:
        """Returns float64 `(T, E)`; over the tasks of `fit` each number has mean 0, each group a variance up to 1."""
        groups = zip(self._scales, self._groups(tasks), strict=True)
        return np.concatenate([scale.transform(raw_TE) / raw_TE.shape[1] ** 0.5 for scale, raw_TE in groups], axis=1)

    def _groups(self, tasks: Sequence[TaskRequest]) -> list[np.ndarray]:
        groups = []
        if self._has_text:
            groups.append(np.asarray(self._words.transform([task.instruction for task in tasks]).todense()))
        if self._has_data:
            groups.append(np.stack([self._statistics(task) for task in tasks]))
        if self._has_labels:
            groups.append(np.stack([landmarks(*_labelled(task)) for task in tasks]))
        return groups

    def _statistics(self, task: TaskRequest) -> np.ndarray:
        assert task.samples_SF is not None, "a task of the corpus shows samples"
        row = [task.samples_SF.mean(dim=0), task.samples_SF.std(dim=0, unbiased=False)]
        if self._has_labels:
            row.append(_class_means(*_labelled(task)).std(dim=0, unbiased=False))
        return torch.cat(row).double().numpy()


def landmarks(samples_SF: Tensor, labels_S: Tensor) -> np.ndarray:
    """Returns leave-one-out accuracies of three classifiers, the log of the number of classes, and their entropy.

    The classifiers are nearest class mean, nearest neighbour and ridge regression.

    Args:
        samples_SF: Inputs.
        labels_S: int64.
    """
    x_SF = samples_SF.double()
    _, labels_S = labels_S.unique(return_inverse=True)
    count_C = labels_S.bincount().double()
    share_C = count_C / count_C.sum()
    entropy = float(-(share_C * share_C.log()).sum())
    right = (_nearest_mean(x_SF, labels_S), _nearest_neighbour(x_SF, labels_S), _ridge(x_SF, labels_S))
    accuracies = [float(right_S.double().mean()) for right_S in right]
    return np.array([*accuracies, np.log(len(count_C)), entropy])


def _nearest_mean(x_SF: Tensor, labels_S: Tensor) -> Tensor:
    """Whether each sample is nearest to the mean of its class without itself, bool `(S,)`."""
    mean_CF, count_C = _class_means(x_SF, labels_S), labels_S.bincount()
    distance_SC = torch.cdist(x_SF, mean_CF)
    # Without itself the class mean lies n / (n - 1) times as far; a class of one sample has none.
    own_S, count_S = distance_SC.gather(1, labels_S[:, None]).squeeze(1), count_C[labels_S].double()
    own_S = torch.where(count_S > 1, own_S * count_S / (count_S - 1).clamp(min=1), torch.inf)
    return distance_SC.scatter(1, labels_S[:, None], own_S[:, None]).argmin(dim=1) == labels_S


def _nearest_neighbour(x_SF: Tensor, labels_S: Tensor) -> Tensor:
    return labels_S[torch.cdist(x_SF, x_SF).fill_diagonal_(torch.inf).argmin(dim=1)] == labels_S


def _ridge(x_SF: Tensor, labels_S: Tensor) -> Tensor:
    """Whether ridge regression on all other samples classifies each one correctly, bool `(S,)`.

    The prediction without sample s is `(prediction - h y) / (1 - h)`, where h is the leverage of s.
    """
    centred_SF = torch.cat([x_SF - x_SF.mean(dim=0), torch.ones(len(x_SF), 1, dtype=x_SF.dtype)], dim=1)
    gram_SS = centred_SF @ centred_SF.T
    penalty = _RIDGE * float(gram_SS.diagonal().mean()) * torch.eye(len(x_SF), dtype=x_SF.dtype)
    hat_SS = torch.linalg.solve(gram_SS + penalty, gram_SS)
    target_SC = torch.nn.functional.one_hot(labels_S).to(x_SF.dtype)
    leverage_S1 = hat_SS.diagonal().unsqueeze(1)
    return ((hat_SS.T @ target_SC - leverage_S1 * target_SC) / (1 - leverage_S1)).argmax(dim=1) == labels_S


def _class_means(samples_SF: Tensor, labels_S: Tensor) -> Tensor:
    """Returns the mean of each class that is present, `(C, F)`."""
    _, labels_S = labels_S.unique(return_inverse=True)
    member_SC = torch.nn.functional.one_hot(labels_S).to(samples_SF.dtype)
    return (member_SC / member_SC.sum(dim=0)).T @ samples_SF


def _labelled(task: TaskRequest) -> tuple[Tensor, Tensor]:
    assert task.samples_SF is not None, "a task of the corpus shows labelled samples"
    assert task.labels_S is not None, "a task of the corpus shows labelled samples"
    return task.samples_SF, task.labels_S
