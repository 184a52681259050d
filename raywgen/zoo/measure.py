"""Measures trained networks: loss on training samples, accuracy on test samples.

Shape letters beyond the legend in `raywgen.weights`: N networks.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from raywgen.tasks import FitData, balanced_accuracy, balanced_cross_entropy, stacked_logits
from raywgen.tasks.train_loop import Execution

_MAX_TRAIN_SAMPLES = 2048
_VALUES_AT_ONCE = 1 << 22


@torch.no_grad()
def measure(
    module: nn.Module,
    state_N: dict[str, Tensor],
    train: FitData,
    test: FitData,
    execution: Execution,
) -> tuple[Tensor, Tensor]:
    """Returns balanced training loss `(N,)`, on at most 2,048 samples, and balanced test accuracy `(N,)`.

    Args:
        module: A network of the architecture, in eval mode.
        state_N: A stacked `state_dict`.
        train: Training samples of the N networks.
        test: Test samples of the N networks.
        execution: The execution with which the networks were trained.
    """
    first = train.first(_MAX_TRAIN_SAMPLES)
    loss_N = balanced_cross_entropy(network_logits(module, state_N, first.x, execution, first.rows_NS), first.labels_NS)
    return loss_N, balanced_accuracy(network_logits(module, state_N, test.x, execution, test.rows_NS), test.labels_NS)


@torch.no_grad()
def network_logits(
    module: nn.Module, state_N: dict[str, Tensor], x: Tensor, execution: Execution, rows_NS: Tensor | None = None
) -> Tensor:
    """Returns outputs `(N, S, C)`, computed some samples at a time; `x` and `rows_NS` are those of `FitData`."""
    num = len(next(iter(state_N.values())))
    if execution == "stacked":
        size = max(1, _VALUES_AT_ONCE // (num * x.shape[-1]))
        return torch.cat([stacked_logits(module, state_N, part) for part in _parts(x, rows_NS, size)], dim=1)
    size = max(1, _VALUES_AT_ONCE // (8 * x.shape[-1]))
    logits = []
    for index in range(num):
        module.load_state_dict({name: tensor[index] for name, tensor in state_N.items()})
        own_1S = None if rows_NS is None else rows_NS.expand(num, -1)[index : index + 1]
        parts = _parts(x[index] if x.dim() == 3 else x, own_1S, size)
        logits.append(torch.cat([module(part) for part in parts]))
    return torch.stack(logits)


def _parts(x: Tensor, rows_NS: Tensor | None, size: int) -> Iterable[Tensor]:
    """Yields inputs of `size` samples: `(S, F)` where all networks share them, else `(N, S, F)`."""
    if rows_NS is None:
        return x.split(size, dim=-2)
    rows = rows_NS[0] if len(rows_NS) == 1 else rows_NS
    return (x[part] for part in rows.split(size, dim=-1))
