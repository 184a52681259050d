"""Collects accuracies of architectures on a corpus' tasks, predicts others, and measures rankings on held-out tasks.

Shape letters beyond the legend in `raywgen.weights`: T tasks, A architectures, E numbers of a task.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raywgen.corpus import Corpus
from raywgen.evaluation.intervals import half_width
from raywgen.evaluation.request import TaskRequest
from raywgen.evaluation.stored_scores import trained_ends
from raywgen.evaluation.task_features import TaskFeatures

FEWEST_TASKS = 6
"""With fewer tasks, nothing is predicted or measured."""
_FOLDS = 5
_PENALTIES = np.logspace(-2, 4, 13)


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """The accuracies that a corpus holds of architectures on tasks.

    Attributes:
        tasks: T tasks.
        splits: Split of each task.
        names: A architectures.
        accuracy_TA: Mean test accuracy of the ends of trajectories; NaN where there is none.
    """

    tasks: list[TaskRequest]
    splits: list[str]
    names: list[str]
    accuracy_TA: np.ndarray

    def rows(self, chosen: Sequence[int]) -> Results:
        """Returns the results of these tasks alone."""
        return Results(
            tasks=[self.tasks[row] for row in chosen],
            splits=[self.splits[row] for row in chosen],
            names=self.names,
            accuracy_TA=self.accuracy_TA[list(chosen)],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """The measured quality of one answer on tasks that it knew nothing of.

    Attributes:
        answer: `predicted`, `generated` or `mean`.
        spearman: Rank correlation over the architectures of a task, mean over the tasks; an answer that is equal for
            all architectures counts as 0.
        half_width: Half the width of its 95 % interval over the tasks.
        over_mean: Its difference to the rank correlation of `mean` on the same tasks.
        over_mean_half_width: Half the width of the 95 % interval of that difference.
        lost_accuracy: Mean test accuracy lost by taking the architecture that it ranks first in place of the best one.
        num_tasks: Number of these tasks.
    """

    answer: str
    spearman: float
    half_width: float
    over_mean: float
    over_mean_half_width: float
    lost_accuracy: float
    num_tasks: int


def collect_results(corpus: Corpus, names: Sequence[str], leave_out: str | None = None) -> Results:
    """Returns the accuracies on all tasks but `leave_out`, which must stay unknown."""
    facts = trained_ends(corpus, [])
    sums: dict[str, dict[str, list[float]]] = {}
    columns = (facts.column(name).to_pylist() for name in ("task_id", "layout_id", "test_accuracy"))
    for task_id, layout_id, accuracy in zip(*columns, strict=True):
        if task_id not in corpus.tasks or task_id == leave_out or accuracy is None or not math.isfinite(accuracy):
            continue
        sums.setdefault(task_id, {}).setdefault(corpus.networks[layout_id].name, []).append(accuracy)
    chosen = [corpus.tasks[task_id] for task_id in sums if any(name in sums[task_id] for name in names)]
    nothing = [math.nan]
    return Results(
        tasks=[
            TaskRequest(instruction=t.instruction, samples_SF=t.samples_SF, labels_S=t.labels_S, task_id=t.task_id)
            for t in chosen
        ],
        splits=[task.split for task in chosen],
        names=list(names),
        accuracy_TA=np.array([[np.mean(sums[t.task_id].get(name, nothing)) for name in names] for t in chosen]),
    )


def predict(known: Results, tasks: Sequence[TaskRequest], like: TaskRequest) -> tuple[np.ndarray, np.ndarray]:
    """Returns the predicted accuracies and the architectures' means, `(T, A)` each, fitted to `known` alone.

    Args:
        known: Results to fit to.
        tasks: T tasks to predict for.
        like: The user's task; what it lacks (instruction, samples, labels) is used of no other task either.
    """
    from sklearn.linear_model import RidgeCV  # Late, as in `raywgen.tasks.digits`.

    features = TaskFeatures(like).fit(known.tasks)
    known_TE, wanted_TE = features.transform(known.tasks), features.transform(tasks)
    mean_A = np.nanmean(known.accuracy_TA, axis=0)
    predicted_TA = np.tile(mean_A, (len(tasks), 1))
    for a in range(len(known.names)):
        has_T = np.isfinite(known.accuracy_TA[:, a])
        if has_T.sum() >= FEWEST_TASKS:
            ridge = RidgeCV(alphas=_PENALTIES).fit(known_TE[has_T], known.accuracy_TA[has_T, a])
            predicted_TA[:, a] = ridge.predict(wanted_TE).clip(0, 1)
    return predicted_TA, np.tile(mean_A, (len(tasks), 1))


def heldout_folds(splits: Sequence[str], seed: int) -> tuple[list[tuple[list[int], list[int]]], str]:
    """Returns the rows to fit to and the held-out rows of each fold, and a description of the split."""
    unseen = [row for row, split in enumerate(splits) if split == "unseen"]
    others = [row for row, split in enumerate(splits) if split != "unseen"]
    if len(unseen) >= FEWEST_TASKS and len(others) >= FEWEST_TASKS:
        return [(others, unseen)], f"fitted to {len(others)} tasks, measured on the corpus' {len(unseen)} unseen ones"
    order = np.random.default_rng(seed).permutation(len(splits)).tolist()
    folds = [(sorted(set(order) - set(order[k::_FOLDS])), sorted(order[k::_FOLDS])) for k in range(_FOLDS)]
    return folds, f"each fifth of {len(splits)} tasks left out in turn, fitted to the others"


def complete(results: Results) -> Results:
    """Returns the results of tasks on which all architectures are known; ranks over fewer would not be comparable."""
    return results.rows(np.flatnonzero(np.isfinite(results.accuracy_TA).all(axis=1)).tolist())


def trust_of(answer: str, score_TA: np.ndarray, mean_TA: np.ndarray, truth_TA: np.ndarray) -> Trust:
    """Measures an answer's scores, higher for better, against the true accuracies, beside the architectures' means."""
    correlation_T, baseline_T = _correlations(score_TA, truth_TA), _correlations(mean_TA, truth_TA)
    taken_T = truth_TA[np.arange(len(truth_TA)), score_TA.argmax(axis=1)]
    return Trust(
        answer=answer,
        spearman=float(correlation_T.mean()),
        half_width=_half_width(correlation_T),
        over_mean=float((correlation_T - baseline_T).mean()),
        over_mean_half_width=_half_width(correlation_T - baseline_T),
        lost_accuracy=float((truth_TA.max(axis=1) - taken_T).mean()),
        num_tasks=len(truth_TA),
    )


def _correlations(score_TA: np.ndarray, truth_TA: np.ndarray) -> np.ndarray:
    pairs = zip(score_TA, truth_TA, strict=True)
    return np.array([rank_correlation(score_A, truth_A) for score_A, truth_A in pairs])


def _half_width(values_T: np.ndarray) -> float:
    """Returns half the width of the normal 95 % interval; infinite for one value."""
    return half_width(float(values_T.std(ddof=1)), len(values_T)) if len(values_T) > 1 else math.inf


def rank_correlation(score_A: np.ndarray, truth_A: np.ndarray) -> float:
    """Returns Spearman's rank correlation; 0 where either side is equal for all architectures."""
    from scipy.stats import spearmanr  # Late, as in `raywgen.tasks.digits`.

    if np.ptp(score_A) == 0 or np.ptp(truth_A) == 0:
        return 0.0
    return float(spearmanr(score_A, truth_A).statistic)  # pyright: ignore[reportAttributeAccessIssue]
