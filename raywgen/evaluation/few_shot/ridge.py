"""Fits a ridge-regression head in closed form; each episode chooses its own regularisation strength.

Source: Bertinetto et al., "Meta-learning with Differentiable Closed-form Solvers", ICLR 2019 (arXiv 1805.08136),
equations 5 and 6, on one-hot labels. The strength is the one with the smallest leave-one-out error on the support set,
which has a closed form as well (Golub, Heath and Wahba, Technometrics 1979, equation 1.3), so there is nothing to tune.

Shape letters beyond the legend in `raywgen.weights`: B episodes, S support samples, Q query samples, R strengths.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raywgen.evaluation.few_shot.heads import members

STRENGTHS = tuple(10.0**power for power in range(-4, 4))
_SMALLEST_SCALE = 1e-6


def standardise_blocks(support: Sequence[Tensor], query: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Concatenates several blocks of features so that each block weighs the same.

    Each block is centred by the mean of the support samples and divided by its root mean square over them times the
    root of its number of features.

    Args:
        support: Blocks `(B, S, E)` of the support samples; E may differ between blocks.
        query: The same blocks of the query samples, `(B, Q, E)`.

    Returns:
        Support `(B, S, sum of E)` and query `(B, Q, sum of E)`.
    """
    parts = []
    for support_BSE, query_BQE in zip(support, query, strict=True):
        centre_B1E = support_BSE.mean(dim=1, keepdim=True)
        centred_BSE = support_BSE - centre_B1E
        scale_B11 = centred_BSE.square().sum(dim=2, keepdim=True).mean(dim=1, keepdim=True).sqrt()
        scale_B11 = scale_B11.clamp(min=_SMALLEST_SCALE)
        parts.append((centred_BSE / scale_B11, (query_BQE - centre_B1E) / scale_B11))
    return torch.cat([part[0] for part in parts], dim=2), torch.cat([part[1] for part in parts], dim=2)


def ridge_logits(
    support_BSE: Tensor,
    support_y_BS: Tensor,
    query_BQE: Tensor,
    num_classes: int,
    *,
    strengths: Sequence[float] = STRENGTHS,
) -> Tensor:
    """Returns scores `(B, Q, C)` of a ridge regression with an unpenalised intercept onto one-hot labels.

    `W = X^T (X X^T + r I)^-1 Y` on centred features X and labels Y. The hat matrix of the support samples is
    `H = X X^T (X X^T + r I)^-1 + 1/S`, and sample s, left out, is missed by `(y_s - (H y)_s) / (1 - H_ss)`.

    Args:
        support_BSE: Features to fit to.
        support_y_BS: Labels, int64, from 0 to C - 1.
        query_BQE: Features to score.
        num_classes: C.
        strengths: The r to choose from, each above 0, in units of the mean squared norm of the centred features.

    Raises:
        FewShotError: Shapes or labels do not fit.
    """
    y_BSC = members(support_BSE, support_y_BS, num_classes)
    mean_B1E, mean_B1C = support_BSE.mean(dim=1, keepdim=True), y_BSC.mean(dim=1, keepdim=True)
    x_BSE, y_BSC = support_BSE - mean_B1E, y_BSC - mean_B1C
    num_support = x_BSE.shape[1]
    values_BS, vectors_BSS = torch.linalg.eigh((x_BSE @ x_BSE.mT).double())
    values_BS = values_BS.clamp(min=0)
    projected_BSC = vectors_BSS.mT @ y_BSC.double()
    unit_B1 = values_BS.mean(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    errors, duals = [], []
    for strength in strengths:
        inverse_BS = 1 / (values_BS + strength * unit_B1)
        dual_BSC = vectors_BSS @ (inverse_BS.unsqueeze(2) * projected_BSC)
        share_BS = values_BS * inverse_BS
        fitted_BSC = vectors_BSS @ (share_BS.unsqueeze(2) * projected_BSC)
        leverage_BS = (vectors_BSS.square() * share_BS.unsqueeze(1)).sum(dim=2) + 1 / num_support
        missed_BSC = (y_BSC.double() - fitted_BSC) / (1 - leverage_BS).clamp(min=_SMALLEST_SCALE).unsqueeze(2)
        errors.append(missed_BSC.square().sum(dim=(1, 2)))
        duals.append(dual_BSC)
    best_B = torch.stack(errors).argmin(dim=0)
    dual_BSC = torch.stack(duals)[best_B, torch.arange(len(best_B))].to(x_BSE.dtype)
    return (query_BQE - mean_B1E) @ x_BSE.mT @ dual_BSC + mean_B1C
