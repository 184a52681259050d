"""Linear heads made in closed form from a task's labelled examples: nearest class means, and ridge regression.

Each comes with its outputs for every example by the head of all other examples, so that heads can be compared on the
very examples that they are made from.

Shape legend: S examples, E features, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raywgen.tasks.fitted_head import SHARPNESS
from raywgen.tasks.ridge_head import fit_ridge_head
from raywgen.tasks.stacked import balanced_cross_entropy

_SMALLEST_SCALE = 1e-6
_SHARPNESSES = tuple(2.0**power for power in range(-5, 6))


@dataclass(frozen=True, slots=True)
class SupportHead:
    """A linear head.

    Attributes:
        weight_CE: Weights.
        bias_C: Biases.
        left_out_SC: Logits of each example by the head that was made from all others; None where a class has a single
            example, without which there would be no such class.
    """

    weight_CE: Tensor
    bias_C: Tensor
    left_out_SC: Tensor | None

    def __call__(self, features_XE: Tensor) -> Tensor:
        """Returns the logits `(X, C)` of other features."""
        return features_XE @ self.weight_CE.T + self.bias_C

    def times(self, factor: float | Tensor) -> SupportHead:
        """Returns the head with all logits multiplied."""
        left_out_SC = None if self.left_out_SC is None else self.left_out_SC * factor
        return SupportHead(self.weight_CE * factor, self.bias_C * factor, left_out_SC)


def nearest_means_head(features_SE: Tensor, labels_S: Tensor, num_classes: int) -> SupportHead:
    """Returns the head whose largest logit is that of the nearest class mean.

    Logits are `2 a m_c . x - a |m_c|^2` (Snell et al., "Prototypical Networks for Few-shot Learning", NeurIPS 2017,
    section 2.4), with `a` such that at one class's mean it is ahead of another by `SHARPNESS` in the mean.

    Args:
        features_SE: Features of the examples.
        labels_S: Their classes, int64; each class has an example.
        num_classes: C.
    """
    member_SC = torch.nn.functional.one_hot(labels_S, num_classes).to(features_SE.dtype)
    count_C = member_SC.sum(dim=0)
    mean_CE = member_SC.T @ features_SE / count_C.unsqueeze(1)
    # About the centre, because lengths of features far from the origin lose the digits that tell classes apart.
    centre_E = mean_CE.mean(dim=0)
    offset_CE, x_SE = mean_CE - centre_E, features_SE - centre_E
    gap = 2 * offset_CE.square().sum(dim=1).mean() * num_classes / max(1, num_classes - 1)
    factor = SHARPNESS / gap.clamp(min=_SMALLEST_SCALE**2)
    left_out_SC = None
    if int(count_C.min()) > 1:
        distance_SC = (x_SE.unsqueeze(1) - offset_CE).square().sum(dim=2)
        # Without x, the mean m of n moves away from x: x - m' = (x - m) n / (n - 1).
        without_C = (count_C / (count_C - 1).clamp(min=1)).square()
        left_out_SC = -factor * torch.where(member_SC > 0, distance_SC * without_C, distance_SC)
    weight_CE = 2 * factor * offset_CE
    return SupportHead(weight_CE, -factor * offset_CE.square().sum(dim=1) - weight_CE @ centre_E, left_out_SC)


def ridge_blocks_head(blocks: Sequence[Tensor], labels_S: Tensor, num_classes: int) -> SupportHead:
    """Returns a head by ridge regression on several blocks of features, joined so that each weighs the same.

    Each block is centred by the mean of the examples and divided by their root mean square about it. The head has this
    in its values and takes the joined features as they are.

    Args:
        blocks: Features `(S, E)` of the examples; E may differ between blocks.
        labels_S: Their classes, int64; each class has an example.
        num_classes: C.
    """
    centres, scales, scaled = [], [], []
    for block_SE in blocks:
        centre_E = block_SE.mean(dim=0)
        offset_SE = block_SE - centre_E
        scale = offset_SE.square().sum(dim=1).mean().sqrt().clamp(min=_SMALLEST_SCALE)
        centres.append(centre_E)
        scales.append(scale.expand(len(centre_E)))
        scaled.append(offset_SE / scale)
    head = fit_ridge_head(torch.cat(scaled, dim=1).unsqueeze(0), labels_S.unsqueeze(0), num_classes)
    weight_CE = head.weight_BEC[0].T / torch.cat(scales)
    bias_C = head.bias_BC[0] - weight_CE @ torch.cat(centres)
    several = int(labels_S.bincount(minlength=num_classes).min()) > 1
    return SupportHead(weight_CE, bias_C, head.left_out_BSC[0] if several else None).times(SHARPNESS)


def left_out_loss(head: SupportHead, labels_S: Tensor) -> float:
    """Returns the class-balanced cross-entropy on each example, in nats, of the head that was made from all others.

    One answer in S + 2 is taken to be any class (the rule of succession): S right answers do not show that there are no
    wrong ones, and without it heads that answer all examples rightly would all have a loss of zero.
    """
    assert head.left_out_SC is not None, "callers ask first"
    wrong = 1 / (len(labels_S) + 2)
    log_p_1SC = head.left_out_SC.log_softmax(dim=1).unsqueeze(0)
    return float((1 - wrong) * balanced_cross_entropy(log_p_1SC, labels_S) - wrong * log_p_1SC.mean())


def sharpened(head: SupportHead, labels_S: Tensor) -> SupportHead:
    """Multiplies all logits by the power of two with the lowest loss on examples that are left out in turn.

    Heads made in different ways have logits of different sizes; a loss compares them only afterwards. Without examples
    that can be left out it returns the head itself.
    """
    if head.left_out_SC is None:
        return head
    return min((head.times(factor) for factor in _SHARPNESSES), key=lambda one: left_out_loss(one, labels_S))
