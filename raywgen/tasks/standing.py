"""Compares a network's accuracy on labelled samples with the accuracy of guessing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from raywgen.tasks.stacked import balanced_accuracy, balanced_cross_entropy

BETTER, WORSE = "better than chance", "worse than chance"
LIKE, UNKNOWN = "not told apart from chance", "too few samples to tell it from chance"
WEAK = "better than chance, but worse than a linear classifier of these samples"
DOUBTFUL = (LIKE, WORSE, WEAK)
_LEVEL = 0.05
_NUM_TABLES = 4_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """The result of a network on labelled samples.

    Attributes:
        loss: Class-balanced cross-entropy, nats.
        accuracy: Balanced: the mean over the classes of the share of their samples that are answered rightly.
        chance: Balanced accuracy of guessing: one over the number of classes.
        share_right: Share of all samples that are answered rightly, whatever their class.
        majority: The share that is right if every answer is the most frequent class.
        num_samples: S.
        num_classes: Number of classes among the labels.
        p_above: Probability that a network whose answers have nothing to do with the samples' classes is at least as
            accurate, times the number of networks that this one was the best of. Such a network gives the same answers
            in any order, so its accuracy is that under random orders of the labels.
        p_below: Probability that such a network is at most as accurate as this one.
        can_tell: Whether there are enough samples to distinguish answers without a mistake from chance.
        linear: Balanced accuracy of a linear classifier on each sample, fitted to the others; None where not measured.
    """

    loss: float
    accuracy: float
    chance: float
    share_right: float
    majority: float
    num_samples: int
    num_classes: int
    p_above: float
    p_below: float
    can_tell: bool
    linear: float | None = None

    @property
    def is_below_linear(self) -> bool:
        """Whether the linear classifier, if measured, is better by more than its own standard error.

        The error counts one right and one wrong answer more, as it would be zero where all answers are right.
        """
        if self.linear is None:
            return False
        smoothed = (self.linear * self.num_samples + 1) / (self.num_samples + 2)
        return self.accuracy < self.linear - math.sqrt(smoothed * (1 - smoothed) / self.num_samples)

    @property
    def guess_loss(self) -> float:
        """Returns the loss of uniform probabilities for every sample, in nats."""
        return math.log(self.num_classes)

    @property
    def verdict(self) -> str:
        """Says at a level of 5 % how the network compares with chance: one of the constants of this file."""
        if self.p_above < _LEVEL:
            return WEAK if self.is_below_linear else BETTER
        if self.p_below < _LEVEL:
            return WORSE
        is_above = self.accuracy > self.chance or self.num_classes == 1
        return UNKNOWN if is_above and not self.can_tell else LIKE

    @property
    def is_doubtful(self) -> bool:
        """Whether a user should be warned: it is no better than chance, or worse than a linear classifier."""
        return self.verdict in DOUBTFUL

    def sentence(self) -> str:
        """Returns the whole result in one line."""
        linear = "" if self.linear is None else f", a linear classifier of the other samples {self.linear:.2f}"
        return (
            f"accuracy {self.accuracy:.2f} over {self.num_classes} classes (chance {self.chance:.2f}{linear}), "
            f"{self.share_right:.2f} of all {self.num_samples:,} samples (the most frequent class alone "
            f"{self.majority:.2f}), loss {self.loss:.3f} (equal odds {self.guess_loss:.3f}): {self.verdict}"
        )


def standing(logits_SC: Tensor, labels_S: Tensor, best_of: int = 1, linear: float | None = None) -> Standing:
    """Judges one network by its outputs.

    Args:
        logits_SC: Outputs.
        labels_S: Classes, int64.
        best_of: Number of networks that it was chosen from by these samples.
        linear: What a linear classifier reaches, as `left_out_accuracy` measures it; None where it was not measured.
    """
    answers_S = logits_SC.argmax(dim=-1)
    present_C, rows_S = labels_S.unique(return_inverse=True)
    kinds_C, columns_S = torch.cat([present_C, answers_S]).unique(return_inverse=True)
    columns_S = columns_S[len(present_C) :]
    table = torch.zeros(len(present_C), len(kinds_C), dtype=torch.int64)
    table.index_put_((rows_S, columns_S), torch.ones_like(rows_S), accumulate=True)
    own = torch.searchsorted(kinds_C, present_C)
    p_above, p_below = _p_values(_plain(table), tuple(own.tolist()))
    perfect = torch.diag(table.sum(dim=1))
    p_perfect, _ = _p_values(_plain(perfect), tuple(range(len(present_C))))
    counts_C = table.sum(dim=1)
    loss = float(balanced_cross_entropy(logits_SC[None].float(), labels_S))
    return Standing(
        loss=loss if math.isfinite(loss) else math.inf,
        accuracy=float(balanced_accuracy(logits_SC[None].float(), labels_S)),
        chance=1 / len(present_C),
        share_right=float((answers_S == labels_S).double().mean()),
        majority=int(counts_C.max()) / len(labels_S),
        num_samples=len(labels_S),
        num_classes=len(present_C),
        p_above=min(1.0, p_above * best_of),
        p_below=p_below,
        can_tell=p_perfect * best_of < _LEVEL,
        linear=linear,
    )


def _plain(table: Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, table.tolist()))


@lru_cache(maxsize=4096)
def _p_values(counts: tuple[tuple[int, ...], ...], own: tuple[int, ...]) -> tuple[float, float]:
    """Returns the shares of random tables with the same margins that are at least, and at most, as accurate.

    Args:
        counts: Samples by class and answer.
        own: The answer that is right for each class.
    """
    table = np.asarray(counts)
    rows = table.sum(axis=1)

    def accuracy(tables: np.ndarray) -> np.ndarray:
        return (tables[..., np.arange(len(own)), list(own)] / rows).mean(axis=-1)

    from scipy.stats import random_table  # Late, as in `raywgen.tasks.digits`.

    # There may be only one such table, where all answers are the same.
    drawn = random_table(rows, table.sum(axis=0)).rvs(_NUM_TABLES, random_state=np.random.default_rng(0))
    reached, own_accuracy = accuracy(drawn), accuracy(table)
    above = int((reached >= own_accuracy - 1e-9).sum())
    below = int((reached <= own_accuracy + 1e-9).sum())
    return (1 + above) / (1 + _NUM_TABLES), (1 + below) / (1 + _NUM_TABLES)
