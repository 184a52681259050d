"""Inputs that are remembered from training, and a predictor of their labels in any task.

A support set of some samples says less of a task than the generator knows of tasks of its kind. A predictor that reads
the task and an input puts that knowledge into labels: with these, remembered inputs stand beside the samples of the
support set, and whatever is measured, or fitted, on samples of a task rests on both.

Shape letters beyond the legend in `raywgen.weights`: M remembered inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from raywgen.generators.units.samples import Activations
from raywgen.tasks import balanced_cross_entropy
from raywgen.weights import WeightBatch


class Predictor(nn.Module):
    """Predicts the class of an input in a task, in one pass.

    Args:
        num_features: F.
        num_classes: C.
        width: H.
    """

    def __init__(self, num_features: int, num_classes: int, width: int) -> None:
        super().__init__()
        H = width
        self.input = nn.Sequential(nn.Linear(num_features, 2 * H), nn.GELU(), nn.Linear(2 * H, H), nn.LayerNorm(H))
        self.task = nn.Linear(H, 2 * H)
        self.head = nn.Sequential(nn.GELU(), nn.Linear(H, H), nn.GELU(), nn.Linear(H, num_classes))

    def forward(self, x_BSF: Tensor, task_BH: Tensor) -> Tensor:
        """Returns logits `(B, S, C)` of S inputs of each of B tasks, or of the same `(1, S, F)` in each."""
        scale_B1H, shift_B1H = self.task(task_BH).unsqueeze(1).chunk(2, dim=-1)
        return self.head(self.input(x_BSF) * (1 + scale_B1H) + shift_B1H)


class References(nn.Module):
    """Remembers M inputs, and sets them with their predicted labels beside the samples of a support set.

    Args:
        num: M.
        num_features: F.
        num_classes: C.
        width: H, values of a task's vector.
    """

    inputs_MF: Tensor

    def __init__(self, num: int, num_features: int, num_classes: int, width: int) -> None:
        super().__init__()
        self.register_buffer("inputs_MF", torch.zeros(num, num_features))
        self.predictor = Predictor(num_features, num_classes, width)

    @torch.no_grad()
    def remember(self, batches: Iterable[WeightBatch], seed: int) -> None:
        """Fills the memory with inputs of some batches, as many of each."""
        M, F = self.inputs_MF.shape
        found = [batch.query.samples_BSF[..., :F].flatten(0, 1) for batch in batches]
        inputs_XF = torch.cat(found).to(self.inputs_MF)
        order_X = torch.randperm(len(inputs_XF), generator=torch.Generator().manual_seed(seed))
        place_M = order_X[torch.arange(M) % len(order_X)]
        self.inputs_MF.copy_(inputs_XF[place_M.to(inputs_XF.device)])

    def beside(self, support: Activations, task_BH: Tensor) -> Activations:
        """Returns a support set with the remembered inputs, each a member of classes by its predicted probabilities.

        They count as much as the predictor beats chance on the support set itself: nothing where it knows nothing of
        the task.
        """
        num_tasks, num_classes = len(task_BH), support.member_BSC.shape[2]
        labels_BS = support.member_BSC.argmax(dim=2)
        with torch.no_grad():
            loss_B = balanced_cross_entropy(self.predictor(support.values_BSnP.squeeze(-1), task_BH), labels_BS)
            weight_B = (1 - loss_B / math.log(num_classes)).clamp(0, 1)
        inputs_1MF = self.inputs_MF.unsqueeze(0)
        member_BMC = self.predictor(inputs_1MF, task_BH).softmax(dim=-1) * weight_B[:, None, None]
        return Activations(
            torch.cat([support.values_BSnP, inputs_1MF.expand(num_tasks, -1, -1).unsqueeze(-1)], dim=1),
            torch.cat([support.member_BSC, member_BMC], dim=1),
            support.grid,
        )
