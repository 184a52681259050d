"""Fits a logistic head to the support features by gradient steps: a baseline without meta-learning.

The head starts at zero and is trained by Adam (Kingma and Ba, arXiv 1412.6980) on the mean cross-entropy, whose
gradient for a sample x of class y is `(softmax(W x + b) - onehot(y)) x^T`. There are two implementations: `fit_heads`
fits the heads of many episodes at once without autograd; `fit_head_autograd` fits a single one in the ordinary way.

Shape letters beyond the legend in `raywgen.weights`: B episodes, S support samples, Q query samples; F = E + 1 counts
the bias.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from raywgen.evaluation.few_shot.errors import FewShotError
from raywgen.evaluation.few_shot.heads import accuracy, head_logits, members

LEARNING_RATES = (0.01, 0.03, 0.1, 0.3)
_BETAS = (0.9, 0.999)
_EPSILON = 1e-8


@torch.no_grad()
def fit_heads(
    support_BSE: Tensor, support_y_BS: Tensor, num_classes: int, *, learning_rate: float, num_steps: Sequence[int]
) -> dict[int, tuple[Tensor, Tensor]]:
    """Fits the heads of B episodes, and returns them after each of some numbers of steps.

    Args:
        support_BSE: Features.
        support_y_BS: Classes, int64, from 0 to C - 1.
        num_classes: C.
        learning_rate: Learning rate of Adam.
        num_steps: Numbers of steps after which heads are returned, in any order; 0 is the zero head.

    Returns:
        For each of `num_steps` the weight `(B, C, E)` and the bias `(B, C)`.

    Raises:
        FewShotError: Shapes or labels do not fit, the rate is not positive, or a number of steps is negative or
            missing.
    """
    _check(learning_rate, num_steps)
    member_BSC = members(support_BSE, support_y_BS, num_classes)
    x_BSF = nn.functional.pad(support_BSE, (0, 1), value=1.0)
    head_BCF = x_BSF.new_zeros(len(x_BSF), num_classes, x_BSF.shape[-1])
    first_BCF, second_BCF = torch.zeros_like(head_BCF), torch.zeros_like(head_BCF)
    heads = {0: _split(head_BCF)} if 0 in num_steps else {}
    for step in range(1, max(num_steps) + 1):
        excess_BSC = (x_BSF @ head_BCF.mT).softmax(dim=-1) - member_BSC
        gradient_BCF = excess_BSC.mT @ x_BSF / x_BSF.shape[1]
        first_BCF.lerp_(gradient_BCF, 1 - _BETAS[0])
        second_BCF.mul_(_BETAS[1]).addcmul_(gradient_BCF, gradient_BCF, value=1 - _BETAS[1])
        size_BCF = (second_BCF.sqrt() / (1 - _BETAS[1] ** step) ** 0.5).add_(_EPSILON)
        head_BCF.addcdiv_(first_BCF, size_BCF, value=-learning_rate / (1 - _BETAS[0] ** step))
        if step in num_steps:
            heads[step] = _split(head_BCF)
    return heads


def fit_head_autograd(
    support_SE: Tensor, support_y_S: Tensor, num_classes: int, *, learning_rate: float, num_steps: int
) -> tuple[Tensor, Tensor]:
    """Fits the head of one episode by `torch.optim.Adam`.

    Returns:
        Weight `(C, E)` and bias `(C,)`.

    Raises:
        FewShotError: The rate is not positive, or the number of steps negative.
    """
    _check(learning_rate, [num_steps])
    head = nn.Linear(support_SE.shape[-1], num_classes, device=support_SE.device, dtype=support_SE.dtype)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.Adam(head.parameters(), lr=learning_rate)
    for _ in range(num_steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(support_SE), support_y_S).backward()
        optimizer.step()
    return head.weight.detach(), head.bias.detach()


def head_accuracies(
    support_BSE: Tensor,
    support_y_BS: Tensor,
    query_BQE: Tensor,
    query_y_BQ: Tensor,
    num_classes: int,
    *,
    num_steps: Sequence[int],
    learning_rates: Sequence[float] = LEARNING_RATES,
) -> dict[tuple[float, int], Tensor]:
    """Returns accuracy `(B,)` on the query samples for each rate and number of steps, to choose on validation tasks."""
    accuracies = {}
    for rate in learning_rates:
        heads = fit_heads(support_BSE, support_y_BS, num_classes, learning_rate=rate, num_steps=num_steps)
        for steps, (weight_BCE, bias_BC) in heads.items():
            accuracies[rate, steps] = accuracy(head_logits(weight_BCE, bias_BC, query_BQE), query_y_BQ)
    return accuracies


def _check(learning_rate: float, num_steps: Sequence[int]) -> None:
    if not learning_rate > 0 or not len(num_steps) or min(num_steps) < 0:
        raise FewShotError(
            f"learning_rate={learning_rate}, num_steps={num_steps}: give a rate above 0, and at least one number of "
            "steps, none negative"
        )


def _split(head_BCF: Tensor) -> tuple[Tensor, Tensor]:
    return head_BCF[..., :-1].clone(), head_BCF[..., -1].clone()
