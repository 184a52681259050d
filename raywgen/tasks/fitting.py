"""Fits a stack of networks at once, each with its own data order.

Shape legend: N networks, S samples, F features, T a minibatch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raywgen.tasks.stacked import balanced_cross_entropy, stacked_logits


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What a fit leaves.

    Attributes:
        states: The stacked `state_dict` after each recorded step.
        loss_N: Each network's class-balanced loss on all its training samples, at the end.
    """

    states: list[dict[str, Tensor]]
    loss_N: Tensor


def fit_stack(
    module: nn.Module,
    start_N: dict[str, Tensor],
    x: Tensor,
    labels_NS: Tensor,
    *,
    record_steps: Sequence[int],
    batch_size: int,
    learning_rate: float,
    order_seeds: Sequence[int],
) -> Fit:
    """Trains N networks by Adam on the class-balanced loss, up to the last recorded step.

    Each sample is weighed so that over all of its network's samples every class weighs the same. The networks
    do not touch each other: the result is that of N loops of one network each.

    Args:
        module: A network of the architecture.
        start_N: Where each starts, with a leading dimension N.
        x: Training inputs `(S, F)` for all networks, or `(N, S, F)`.
        labels_NS: int64.
        record_steps: Steps after which the weights are kept, ascending; 0 is the start.
        batch_size: T; at least S means full batches.
        learning_rate: Of Adam.
        order_seeds: N seeds of data order: a fresh permutation every epoch.
    """
    state_N = {name: tensor.detach().clone() for name, tensor in start_N.items()}
    trained = [tensor.requires_grad_() for tensor in state_N.values() if tensor.is_floating_point()]
    optimizer = torch.optim.Adam(trained, lr=learning_rate, foreach=True)
    weights_NS = _sample_weights(labels_NS)
    order = _DataOrder(order_seeds, labels_NS.shape[1], batch_size)
    rows_N1 = torch.arange(len(labels_NS)).unsqueeze(1)
    recorded = [_snapshot(state_N)] if 0 in record_steps else []
    for step in range(1, max(record_steps) + 1):
        index_NT = order.next()
        x_NTF = x[index_NT] if x.dim() == 2 else x[rows_N1, index_NT]
        logits = stacked_logits(module, state_N, x_NTF)
        loss_NT = nn.functional.cross_entropy(logits.transpose(1, 2), labels_NS.gather(1, index_NT), reduction="none")
        optimizer.zero_grad()
        (loss_NT * weights_NS.gather(1, index_NT)).mean(dim=1).sum().backward()
        optimizer.step()
        if step in record_steps:
            recorded.append(_snapshot(state_N))
    with torch.no_grad():
        loss_N = balanced_cross_entropy(stacked_logits(module, state_N, x), labels_NS)
    return Fit(states=recorded, loss_N=loss_N)


def repeat_state(state: dict[str, Tensor], num: int) -> dict[str, Tensor]:
    """The same `state_dict` for `num` networks, as a stack."""
    return {name: tensor.detach().expand(num, *tensor.shape).clone() for name, tensor in state.items()}


class _DataOrder:
    """Minibatches without replacement, a fresh permutation per epoch and network."""

    def __init__(self, seeds: Sequence[int], num_samples: int, batch_size: int) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._num_samples = num_samples
        self._batch_size = min(batch_size, num_samples)
        self._order_NS = torch.empty(0)
        self._cursor = num_samples

    def next(self) -> Tensor:
        if self._cursor + self._batch_size > self._num_samples:
            self._order_NS = torch.stack(
                [torch.randperm(self._num_samples, generator=generator) for generator in self._generators]
            )
            self._cursor = 0
        self._cursor += self._batch_size
        return self._order_NS[:, self._cursor - self._batch_size : self._cursor]


def _sample_weights(labels_NS: Tensor) -> Tensor:
    """Weights `(N, S)` of mean 1 under which every class present weighs the same."""
    member_NSC = nn.functional.one_hot(labels_NS).float()
    share_NC = member_NSC.mean(dim=1)
    num_present_N1 = (share_NC > 0).sum(dim=1, keepdim=True)
    weight_NC = 1 / (share_NC.clamp(min=1e-12) * num_present_N1)
    return weight_NC.gather(1, labels_NS)


def _snapshot(state_N: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state_N.items()}
