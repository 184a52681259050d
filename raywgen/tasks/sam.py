"""The ascent step of sharpness-aware minimisation, for one network or for a stack of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raywgen.tasks.fit_config import SAMConfig

_EPSILON = 1e-12


@torch.no_grad()
def ascend(parameters: Sequence[Tensor], config: SAMConfig, *, stacked: bool) -> list[Tensor]:
    """Moves parameters to the worst point within the radius, by their gradients.

    SAM (arXiv 2010.01412, Eq. 2): `w + rho * g / ||g||`. Adaptive (arXiv 2102.11600, Eq. 5, T = |w|):
    `w + rho * w^2 g / ||w g||`. The norm is global over all tensors of one network.

    Args:
        parameters: Parameters of one network, or of N with a leading dimension; each has a gradient.
        config: Radius and kind.
        stacked: Whether there is a leading dimension; the norm is then taken for each network.

    Returns:
        Copies of the parameters before the step.
    """
    kept = [parameter.clone() for parameter in parameters]
    gradients = [_gradient(parameter) for parameter in parameters]
    scaled = [p.abs() * g for p, g in zip(parameters, gradients, strict=True)] if config.adaptive else gradients
    first = 1 if stacked else 0
    squares = [part.square().sum(dim=tuple(range(first, part.dim()))) if part.dim() > first else part.square()
               for part in scaled]  # fmt: skip
    step = config.rho / (torch.stack(squares).sum(dim=0).sqrt() + _EPSILON)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        length = step.view(-1, *[1] * (parameter.dim() - 1)) if stacked else step
        parameter.add_((parameter.square() * gradient if config.adaptive else gradient) * length)
    return kept


@torch.no_grad()
def descend(parameters: Sequence[Tensor], kept: Sequence[Tensor]) -> None:
    """Restores the parameters from before `ascend`; their gradients stay those of the worst point."""
    for parameter, before in zip(parameters, kept, strict=True):
        parameter.copy_(before)


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None, "call backward first"
    return parameter.grad
