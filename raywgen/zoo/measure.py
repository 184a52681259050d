"""What trained networks are worth: loss on training samples, accuracy on test samples.

Shape legend: N networks, S samples, F features, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from raywgen.tasks import balanced_accuracy, balanced_cross_entropy, stacked_logits

_MAX_TRAIN_SAMPLES = 2048
_VALUES_AT_ONCE = 1 << 22


@torch.no_grad()
def measure(
    module: nn.Module,
    state_N: dict[str, Tensor],
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    way: str,
) -> tuple[Tensor, Tensor]:
    """Balanced training loss `(N,)` (on at most 2,048 samples) and balanced test accuracy `(N,)`.

    Args:
        module: Any network of the architecture, in eval mode.
        state_N: A stacked `state_dict`.
        train: Inputs `(S, F)` or `(N, S, F)`, and labels `(N, S)`.
        test: Likewise.
        way: As it was trained.
    """
    (train_x, train_y_NS), (test_x, test_y_NS) = train, test
    first = slice(0, _MAX_TRAIN_SAMPLES)
    train_logits = network_logits(module, state_N, train_x[..., first, :], way)
    loss_N = balanced_cross_entropy(train_logits, train_y_NS[:, first])
    return loss_N, balanced_accuracy(network_logits(module, state_N, test_x, way), test_y_NS)


@torch.no_grad()
def network_logits(module: nn.Module, state_N: dict[str, Tensor], x: Tensor, way: str) -> Tensor:
    """Outputs `(N, S, C)`, some samples at a time; arguments as `measure`, inputs `(S, F)` or `(N, S, F)`."""
    num = len(next(iter(state_N.values())))
    if way == "stack":
        size = max(1, _VALUES_AT_ONCE // (num * x.shape[-1]))
        return torch.cat([stacked_logits(module, state_N, part) for part in x.split(size, dim=-2)], dim=1)
    size = max(1, _VALUES_AT_ONCE // (8 * x.shape[-1]))
    logits = []
    for index in range(num):
        module.load_state_dict({name: tensor[index] for name, tensor in state_N.items()})
        own = x[index] if x.dim() == 3 else x
        logits.append(torch.cat([module(part) for part in own.split(size)]))
    return torch.stack(logits)
