"""Classifies by the nearest class mean in feature space: a baseline that fits nothing but these means.

Source: Snell et al., "Prototypical Networks for Few-shot Learning", NeurIPS 2017 (arXiv 1703.05175), equations 1 and 2;
the same as a linear head, section 2.4.

Shape letters beyond the legend in `raywgen.weights`: B episodes, S support samples, Q query samples.
"""

from __future__ import annotations

from torch import Tensor

from raywgen.evaluation.few_shot.errors import FewShotError
from raywgen.evaluation.few_shot.heads import members


def prototypes(support_BSE: Tensor, support_y_BS: Tensor, num_classes: int) -> Tensor:
    """Returns the means m_c of the support features of each class, `(B, C, E)`.

    Args:
        support_BSE: Features.
        support_y_BS: Classes, int64, from 0 to C - 1.
        num_classes: C.

    Raises:
        FewShotError: Shapes or labels do not fit, or an episode has no sample of a class.
    """
    member_BSC = members(support_BSE, support_y_BS, num_classes)
    count_BC = member_BSC.sum(dim=1)
    if not bool(count_BC.all()):
        episode, label = (count_BC == 0).nonzero()[0].tolist()
        raise FewShotError(
            f"episode {episode} has no support sample of class {label}; give at least one of each class, or lower "
            f"num_classes={num_classes}"
        )
    return member_BSC.mT @ support_BSE / count_BC.unsqueeze(-1)


def prototype_logits(support_BSE: Tensor, support_y_BS: Tensor, query_BQE: Tensor, num_classes: int) -> Tensor:
    """Returns `-||x - m_c||^2`, `(B, Q, C)`, of query features; other arguments and errors as in `prototypes`."""
    means_BCE = prototypes(support_BSE, support_y_BS, num_classes)
    return -(query_BQE.unsqueeze(2) - means_BCE.unsqueeze(1)).square().sum(dim=-1)
