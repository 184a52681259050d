"""Reptile as a pseudo-gradient (Nichol et al. 2018, arXiv 1803.02999, algorithm 2).

For every item of a meta-batch the parameters phi take K steps of gradient descent on the item's own loss, to phi_i. The
outer update `phi + zeta / B sum_i (phi_i - phi)` is the ordinary descent step of rate zeta on

    < phi, sg[ mean_i (phi - phi_i) ] >

whose gradient is that mean difference. So an ordinary trainer takes the step, averages it over workers like any
gradient, and may use another optimiser than plain descent. Here B counts the items of a meta-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

Parameters = Mapping[str, Tensor]
InnerLoss = Callable[..., Tensor]
"""Takes parameters and one item's tensors, and returns a scalar."""


def adapt(
    parameters: Parameters, loss: InnerLoss, steps: Sequence[Sequence[Tensor]], rate: float
) -> tuple[Parameters, Tensor]:
    """Takes K steps of gradient descent for B items at once, from the same start.

    Args:
        parameters: phi, by name.
        loss: The loss of one item.
        steps: For each of K steps the tensors of all items, each with a leading dimension B.
        rate: Learning rate of the descent (eta).

    Returns:
        phi_i by name, with a leading dimension B, detached; and each item's loss before its first step, `(B,)`.
    """
    num_items = len(steps[0][0])
    adapted = {name: p.detach().expand(num_items, *p.shape) for name, p in parameters.items()}
    first_loss_B = None
    for tensors in steps:
        gradients, loss_B = vmap(grad_and_value(loss))(adapted, *tensors)
        adapted = {name: value - rate * gradients[name] for name, value in adapted.items()}
        first_loss_B = loss_B if first_loss_B is None else first_loss_B
    assert first_loss_B is not None
    return {name: value.detach() for name, value in adapted.items()}, first_loss_B.detach()


def pseudo_gradient_loss(parameters: Parameters, adapted: Parameters) -> Tensor:
    """Returns `< phi, sg[ mean_i (phi - phi_i) ] >`, a scalar whose gradient is the mean difference.

    Args:
        parameters: phi, which the gradient flows to.
        adapted: phi_i by name, with a leading dimension B.
    """
    products = [
        (parameter * (parameter.detach() - adapted[name].mean(dim=0))).sum() for name, parameter in parameters.items()
    ]
    return torch.stack(products).sum()
