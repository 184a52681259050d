"""Measures how far generated networks are from every network of the training corpus, in weights and in behaviour.

"As good as the pretrained one" is also what a copy would be. A network's distance is measured to the nearest
stored network, relative to the scale of each tensor; its behaviour by the overlap (intersection over union) of
its errors with that network's. Both are set beside the same measures of networks that were trained on the task
and held out from the generator.

Shape letters beyond the legend in `raywgen.weights`: T networks, R stored networks, I test images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raywgen.evaluation.results import NoveltyRow
from raywgen.evaluation.task_evaluator import TaskEvaluator
from raywgen.training.stored_weights import Weights, whole_blocks
from raywgen.weights import Normalizer

_REPLICA = 0.1
_NOVEL = 0.5
# Beyond this torch computes distances by inner products, unless it is set otherwise.
_FEW = 25


@dataclass(frozen=True, slots=True, kw_only=True)
class Nearness:
    """T networks beside their nearest stored ones.

    Attributes:
        distance_T: Root mean square difference, in standard deviations of each tensor over the corpus.
        overlap_T: Errors in common over errors of either, in [0, 1]; 0 where neither errs.
    """

    distance_T: Tensor
    overlap_T: Tensor


def nearness(evaluator: TaskEvaluator, values_TD: Tensor) -> Nearness:
    """Returns distance to, and error overlap with, the nearest stored network."""
    stored = evaluator.stored
    distance_T, nearest_T = nearest_stored(values_TD, stored.weights, evaluator.normalizer)
    overlap_T = error_overlap(evaluator.errors(values_TD), evaluator.errors(stored.values(nearest_T)))
    return Nearness(distance_T=distance_T, overlap_T=overlap_T)


def nearest_stored(values_TD: Tensor, weights: Weights, normalizer: Normalizer) -> tuple[Tensor, Tensor]:
    """Returns the distance to the nearest of many stored networks `(T,)`, and its index int64; reads them in blocks."""
    normalised_TD = normalizer.normalise(values_TD)
    distance_T = values_TD.new_full((len(values_TD),), torch.inf)
    nearest_T = torch.zeros(len(values_TD), dtype=torch.int64)
    mode = _mode(len(values_TD), len(weights))
    for index_B, stored_BD in whole_blocks(weights, values_TD.shape[1]):
        apart_TB = _apart(normalised_TD, normalizer.normalise(stored_BD), mode)
        least_T, place_T = apart_TB.min(dim=1)
        is_nearer_T = ~(least_T >= distance_T)  # A distance that is no number stays one.
        distance_T = torch.where(is_nearer_T, least_T, distance_T)
        nearest_T = torch.where(is_nearer_T, index_B[place_T], nearest_T)
    return distance_T, nearest_T


def distances(values_TD: Tensor, stored_RD: Tensor, normalizer: Normalizer) -> Tensor:
    """Returns root mean square differences `(T, R)`, in standard deviations of each tensor over the corpus."""
    mode = _mode(len(values_TD), len(stored_RD))
    return _apart(normalizer.normalise(values_TD), normalizer.normalise(stored_RD), mode)


def _apart(normalised_TD: Tensor, stored_RD: Tensor, mode: str) -> Tensor:
    return torch.cdist(normalised_TD, stored_RD, compute_mode=mode) / normalised_TD.shape[1] ** 0.5


def _mode(num: int, num_stored: int) -> str:
    """Returns how torch would compute all distances at once, so that they do not depend on the size of blocks."""
    few = max(num, num_stored) <= _FEW
    return "donot_use_mm_for_euclid_dist" if few else "use_mm_for_euclid_dist"


def error_overlap(wrong_TI: Tensor, other_TI: Tensor) -> Tensor:
    """Returns the intersection over union of two sets of errors, `(T,)`; 0 where both are empty."""
    union_T = (wrong_TI | other_TI).sum(dim=1)
    return (wrong_TI & other_TI).sum(dim=1) / union_T.clamp(min=1)


def novelty_rows(evaluator: TaskEvaluator, kind: str, values_TD: Tensor, accuracy_T: Tensor) -> list[NoveltyRow]:
    """Returns one row per network for the report."""
    near = nearness(evaluator, values_TD)
    return [
        NoveltyRow(
            kind=kind,
            split=evaluator.split,
            layout=evaluator.network,
            task=task.id,
            weight_distance=round(float(near.distance_T[index]), 5),
            error_overlap=round(float(near.overlap_T[index]), 5),
            accuracy=round(float(accuracy_T[index]), 5),
        )
        for index, task in enumerate(evaluator.tasks)
    ]


def verdict(rows: list[NoveltyRow], figures: dict[str, float]) -> tuple[str, str]:
    """Returns a word and a sentence on the generated networks of unseen tasks; where there are none, of seen ones.

    It is about novelty; how generated networks stand to the best of all baselines says `headline`.

    `replica`: nearer to a stored network than a tenth of the distance of networks that were trained on the tasks and
    held out. `novel`: at least half that distance, and more accurate than retrieval, average, noise and Gaussian.
    `interpolation`: anything between.
    `unjudged`: no replica, but no network was held out to compare the distance with.
    """
    split = judged_split(rows)
    heldout, generated = median_distance(rows, "original"), median_distance(rows, "generated")
    baselines = {name: figures[f"{split}_{name}"] for name in ("nearest", "average", "noise", "gaussian")}
    best = max(baselines, key=lambda name: baselines[name])
    # Of the figures as they are shown.
    lead = round(round(figures[f"{split}_generated"], 1) - round(baselines[best], 1), 1)
    scores = (
        f"score {abs(lead):.1f} percentage points {'above' if lead > 0 else 'below'} what stored networks give without "
        f"a generator (the best of retrieval, average, noise and Gaussian: {best}, {baselines[best]:.1f} %)"
    )
    if not heldout:
        word = "replica" if generated < _REPLICA else "unjudged"
        return word, (
            f"Generated networks lie {generated:.2f} standard deviations of the corpus from their nearest stored "
            f"network and {scores}. No network was held out to compare this distance with; hold some out by "
            "`raywgen corpus split`, and train on the rest."
        )
    distance = generated / heldout
    word = "replica" if distance < _REPLICA else "novel" if distance >= _NOVEL and lead > 0 else "interpolation"
    return word, (
        f"On {split} tasks, generated networks lie {distance:.2f} times as far from their nearest stored network as "
        f"networks trained on those tasks do, and {scores}."
    )


def judged_split(rows: list[NoveltyRow]) -> str:
    """Returns `unseen` where there are such tasks, else `seen`."""
    return "unseen" if any(row.split == "unseen" for row in rows) else "seen"


def median_distance(rows: list[NoveltyRow], kind: str) -> float:
    """Returns the median weight distance of the judged split's networks of one kind; 0 where there are none."""
    split = judged_split(rows)
    chosen = [row.weight_distance for row in rows if row.kind == kind and row.split == split]
    return float(torch.tensor(chosen).median()) if chosen else 0.0
