"""Fits the layer of outputs to samples of the task, followed to its inputs, by ridge regression in closed form.

Shape letters beyond the legend in `raywgen.weights`: X values that an output reads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from raywgen.generators.units.samples import Activations

_FIRST_STRENGTH = 0.03
_FIRST_SCALE = 4.0
_LEAST = 1e-6


class FittedOutput(nn.Module):
    """Ridge regression to the classes of samples, with a strength and a scale of its outputs that are learned.

    Samples may belong to classes in part. All classes weigh the same, whatever their numbers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log_strength = nn.Parameter(torch.tensor(math.log(_FIRST_STRENGTH)))
        self.log_scale = nn.Parameter(torch.tensor(math.log(_FIRST_SCALE)))

    def forward(self, given: Activations, num_outputs: int, has_bias: bool) -> tuple[Tensor, Tensor]:
        """Returns rows `(B, n, X)` and biases `(B, n)`, differentiable in the memberships alone.

        Args:
            given: The samples as the layer reads them.
            num_outputs: n; outputs beyond the classes of the samples are zero.
            has_bias: Whether there is a bias; without one the fit goes through the origin.
        """
        x_BSX, member_BSC = given.values_BSnP.squeeze(-1).detach(), given.member_BSC
        num_classes = member_BSC.shape[2]
        # The root of a weight of zero has no gradient, and weights need none: targets have one.
        part_BSC = member_BSC.detach()
        share_BSC = part_BSC / part_BSC.sum(dim=1, keepdim=True).clamp(min=_LEAST)
        weight_BS1 = share_BSC.sum(dim=2, keepdim=True) / share_BSC.sum(dim=(1, 2), keepdim=True)
        target_BSC = member_BSC / member_BSC.sum(dim=2, keepdim=True).clamp(min=_LEAST) - 1 / num_classes
        centre_B1X, centre_B1C = (weight_BS1 * x_BSX).sum(dim=1, keepdim=True), 0.0
        if has_bias:
            centre_B1C = (weight_BS1 * target_BSC).sum(dim=1, keepdim=True)
            x_BSX, target_BSC = x_BSX - centre_B1X, target_BSC - centre_B1C
        root_BS1 = weight_BS1.sqrt()
        weight_BXC = self._solved(root_BS1 * x_BSX, root_BS1 * target_BSC)
        bias_BC = (centre_B1C - centre_B1X @ weight_BXC).squeeze(1) if has_bias else weight_BXC.new_zeros(())
        scale, missing = self.log_scale.exp(), num_outputs - num_classes
        rows_BnX = nn.functional.pad(scale * weight_BXC.mT, (0, 0, 0, missing))
        return rows_BnX, nn.functional.pad((scale * bias_BC).expand(len(x_BSX), num_classes), (0, missing))

    def _solved(self, x_BSX: Tensor, y_BSC: Tensor) -> Tensor:
        """Solves for the weights `(B, X, C)` among as few unknowns as there are values or samples."""
        size_B11 = x_BSX.square().sum(dim=(1, 2), keepdim=True).clamp(min=_LEAST)
        S, X = x_BSX.shape[1:]
        if X <= S:
            identity = torch.eye(X, dtype=x_BSX.dtype, device=x_BSX.device)
            strength_B11 = self.log_strength.exp() * size_B11 / X
            return torch.linalg.solve(x_BSX.mT @ x_BSX + strength_B11 * identity, x_BSX.mT @ y_BSC)
        identity = torch.eye(S, dtype=x_BSX.dtype, device=x_BSX.device)
        strength_B11 = self.log_strength.exp() * size_B11 / X
        return x_BSX.mT @ torch.linalg.solve(x_BSX @ x_BSX.mT + strength_B11 * identity, y_BSC)
