"""Measures how well generated networks do their tasks, differentiably in their weights."""

from __future__ import annotations

import torch
from torch import Tensor

from raywgen.nn.batch_norm import Statistics, differentiable
from raywgen.tasks import balanced_accuracy, balanced_cross_entropy, stacked_logits
from raywgen.tasks.fitted_head import fits_head, fitted_logits
from raywgen.weights import Condition, WeightBatch

BYTES_PER_VALUE = 40.0
"""Bytes that a loss of a network keeps for each of its values, as measured: the value itself, what it was made from by
base and scale, and gradients; without what the network's own layers keep."""


def task_loss(
    values_BD: Tensor, batch: WeightBatch, samples: Condition | None = None, statistics: Statistics = "stored"
) -> tuple[Tensor, Tensor]:
    """Returns class-balanced cross-entropy in nats and accuracy, `(B,)` each, differentiable in the weights.

    Heads that are fitted are fitted to the samples of the condition.

    Args:
        values_BD: Flat vectors of the batch's layout.
        batch: Its layout, module and query samples are used.
        samples: Samples to judge by; the batch's query samples by default.
        statistics: Statistics of batch normalisation: `stored` in the weights, or those of the `batch` of samples.
    """
    judged = batch.query if samples is None else samples
    module = differentiable(batch.module, statistics)
    state_B = batch.layout.unflatten(values_BD)
    if fits_head(module):
        support = batch.condition
        logits_BSC = fitted_logits(module, state_B, support.samples_BSF, support.labels_BS, judged.samples_BSF)
    else:
        logits_BSC = stacked_logits(module, state_B, judged.samples_BSF)
    return balanced_cross_entropy(logits_BSC, judged.labels_BS), balanced_accuracy(logits_BSC, judged.labels_BS)


def all_samples(batch: WeightBatch) -> Condition:
    """Returns the samples of the condition and the query samples of each task, one after the other."""
    support, query = batch.condition, batch.query
    return Condition(
        instructions=support.instructions,
        samples_BSF=torch.cat([support.samples_BSF, query.samples_BSF], dim=1),
        labels_BS=torch.cat([support.labels_BS, query.labels_BS], dim=1),
    )
