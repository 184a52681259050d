"""A linear classifier on few features by ridge regression, its strength chosen by leaving examples out.

Shape legend: B tasks, S examples, E values of a feature, C classes, P strengths.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STRENGTHS = tuple(10.0**exponent for exponent in range(-3, 4))
"""Strengths of ridge regression, as multiples of the mean squared length of a centred feature."""


@dataclass(frozen=True, slots=True)
class RidgeHead:
    """B classifiers.

    Attributes:
        weight_BEC: Weights.
        bias_BC: Biases.
        left_out_BSC: Outputs for each example of the classifier that was fitted to the others.
    """

    weight_BEC: Tensor
    bias_BC: Tensor
    left_out_BSC: Tensor

    def __call__(self, features_BXE: Tensor) -> Tensor:
        """Returns the outputs `(B, X, C)` for other features."""
        return features_BXE @ self.weight_BEC + self.bias_BC.unsqueeze(1)


def fit_ridge_head(
    features_BSE: Tensor, labels_BS: Tensor, num_classes: int, strengths: tuple[float, ...] = STRENGTHS
) -> RidgeHead:
    """Fits classifiers to one-hot labels, differentiably in the features.

    Each strength is judged by the squared error on every example of the classifier that was fitted to all others, which
    ridge regression gives in closed form (Hastie et al., "The Elements of Statistical Learning", equation 7.64). All
    classes weigh the same, whatever their numbers.

    Args:
        features_BSE: Features of the examples.
        labels_BS: Their classes, int64.
        num_classes: C.
        strengths: Strengths to choose from.
    """
    target_BSC = torch.nn.functional.one_hot(labels_BS, num_classes).to(features_BSE.dtype)
    target_BSC = target_BSC - 1 / num_classes
    count_BC = (target_BSC > 0).sum(dim=1)
    share_BS = 1 / count_BC.gather(1, labels_BS).to(features_BSE.dtype)
    share_BS1 = (share_BS / share_BS.sum(dim=1, keepdim=True)).unsqueeze(-1)
    centre_B1E, centre_B1C = ((share_BS1 * x).sum(dim=1, keepdim=True) for x in (features_BSE, target_BSC))
    # Rows scaled by the root of their weight make of weighted regression an ordinary one.
    root_BS1 = (share_BS1 * labels_BS.shape[1]).sqrt()
    x_BSE, y_BSC = root_BS1 * (features_BSE - centre_B1E), root_BS1 * (target_BSC - centre_B1C)
    gram_BSS = x_BSE @ x_BSE.transpose(1, 2)
    size_B = gram_BSS.diagonal(dim1=1, dim2=2).mean(dim=1).clamp(min=1e-12)
    strength_PB = torch.tensor(strengths, dtype=x_BSE.dtype, device=x_BSE.device).unsqueeze(1) * size_B
    identity_SS = torch.eye(gram_BSS.shape[1], dtype=x_BSE.dtype, device=x_BSE.device)
    with torch.no_grad():
        inverse_PBSS = torch.linalg.inv(gram_BSS + strength_PB[..., None, None] * identity_SS)
        error_PBSC = _left_out_error(inverse_PBSS, y_BSC, root_BS1)
        best_B = error_PBSC.square().mean(dim=(2, 3)).argmin(dim=0)
    chosen_B = strength_PB.gather(0, best_B.unsqueeze(0))[0]
    dual_BSC = torch.linalg.solve(gram_BSS + chosen_B[:, None, None] * identity_SS, y_BSC)
    weight_BEC = x_BSE.transpose(1, 2) @ dual_BSC
    bias_BC = (centre_B1C - centre_B1E @ weight_BEC).squeeze(1)
    place = best_B.view(1, -1, 1, 1).expand(1, *error_PBSC.shape[1:])
    return RidgeHead(weight_BEC, bias_BC, target_BSC - error_PBSC.gather(0, place)[0] / root_BS1)


def _left_out_error(inverse_PBSS: Tensor, y_BSC: Tensor, root_BS1: Tensor) -> Tensor:
    """Returns the error on each example of what was fitted to the others, in the rows' scale.

    With `A = (G + s I)^-1` it is `A y / diag(A)`, where the centre counts as one more coefficient without a penalty.
    """
    root_PBS1 = root_BS1.expand(*inverse_PBSS.shape[:-1], 1)
    by_root_PBS1 = inverse_PBSS @ root_PBS1
    total_PB11 = root_PBS1.transpose(-1, -2) @ by_root_PBS1
    free_PBSS = inverse_PBSS - by_root_PBS1 @ by_root_PBS1.transpose(-1, -2) / total_PB11
    return (free_PBSS @ y_BSC) / free_PBSS.diagonal(dim1=-2, dim2=-1).unsqueeze(-1).clamp(min=1e-12)
