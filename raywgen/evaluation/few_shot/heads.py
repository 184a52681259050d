"""Linear heads over features, one for each of B episodes.

Shape letters beyond the legend in `raywgen.weights`: B episodes, S support samples, Q query samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raywgen.evaluation.few_shot.errors import FewShotError


def head_logits(weight_BCE: Tensor, bias_BC: Tensor, query_BQE: Tensor) -> Tensor:
    """Returns the logits `w_c . x + b_c`, `(B, Q, C)`."""
    return torch.baddbmm(bias_BC.unsqueeze(1), query_BQE, weight_BCE.mT)


def accuracy(logits_BQC: Tensor, labels_BQ: Tensor) -> Tensor:
    """Returns the share of samples whose largest logit is their class's, `(B,)` in [0, 1]."""
    return (logits_BQC.argmax(dim=-1) == labels_BQ).float().mean(dim=-1)


def members(support_BSE: Tensor, support_y_BS: Tensor, num_classes: int) -> Tensor:
    """Returns the one-hot classes of the support samples, `(B, S, C)` in the dtype of the features.

    Raises:
        FewShotError: Shapes do not fit, or a label is out of range.
    """
    if support_BSE.dim() != 3 or support_y_BS.shape != support_BSE.shape[:2] or not support_y_BS.numel():
        raise FewShotError(
            f"support {tuple(support_BSE.shape)} with labels {tuple(support_y_BS.shape)}: give (B, S, E) and (B, S), "
            "not empty"
        )
    if not 0 <= int(support_y_BS.min()) <= int(support_y_BS.max()) < num_classes:
        raise FewShotError(
            f"labels from {int(support_y_BS.min())} to {int(support_y_BS.max())} for num_classes={num_classes}: give "
            "labels from 0 to num_classes - 1"
        )
    return torch.nn.functional.one_hot(support_y_BS, num_classes).to(support_BSE.dtype)
