"""Scores of several networks for one task, each alone and as a mixture of what they predict.

Where few labelled samples leave open what the task is, several networks may each be right about a part of it. Their
mixture is the mean of their predicted probabilities.

Shape letters beyond the legend in `raywgen.weights`: n networks of a task, I test samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from raywgen.tasks import balanced_accuracy

_NUM_BINS = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureScore:
    """The scores of a mixture of networks on test samples.

    Attributes:
        accuracy: Balanced accuracy, in [0, 1].
        log_likelihood: Mean log-probability of the right class, in nats.
        calibration_error: Expected calibration error, in [0, 1]: the mean distance of confidence and accuracy over bins
            of equal width in confidence, weighted by their samples (Naeini et al., AAAI 2015; Guo et al., arXiv
            1706.04599, equation 3).
    """

    accuracy: float
    log_likelihood: float
    calibration_error: float


def mixture_log_probs(logits_nIC: Tensor) -> Tensor:
    """Returns the log of the mean probability of each class over n networks, `(I, C)`."""
    return logits_nIC.double().log_softmax(dim=-1).logsumexp(dim=0) - math.log(len(logits_nIC))


def mixture_score(logits_nIC: Tensor, labels_I: Tensor) -> MixtureScore:
    """Scores the mixture of n networks; of one network, this is its own score.

    Args:
        logits_nIC: Their outputs.
        labels_I: Classes of the test samples, int64.
    """
    log_p_IC = mixture_log_probs(logits_nIC)
    return MixtureScore(
        accuracy=float(balanced_accuracy(log_p_IC.unsqueeze(0), labels_I)),
        log_likelihood=float(log_p_IC.gather(1, labels_I.unsqueeze(1)).mean()),
        calibration_error=calibration_error(log_p_IC.exp(), labels_I),
    )


def calibration_error(probabilities_IC: Tensor, labels_I: Tensor) -> float:
    """Returns the expected calibration error of predicted probabilities, in 15 bins of confidence."""
    confidence_I, answers_I = probabilities_IC.max(dim=1)
    right_I = (answers_I == labels_I).double()
    bin_I = (confidence_I * _NUM_BINS).ceil().long().clamp(1, _NUM_BINS) - 1
    gap_b = torch.zeros(_NUM_BINS, dtype=torch.float64).index_add_(0, bin_I, right_I - confidence_I.double())
    return float(gap_b.abs().sum() / len(labels_I))
