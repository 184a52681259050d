"""Fits a stack of networks at once, each with its own data order.

Shape legend: N networks, S samples, F features, T samples of a minibatch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from raywgen.tasks.stacked import stacked_logits


def fit_stack(
    module: nn.Module,
    start_N: dict[str, Tensor],
    x: Tensor,
    labels_NS: Tensor,
    *,
    num_steps: int,
    batch_size: int,
    learning_rate: float,
    order_seeds: Sequence[int],
    record_steps: Sequence[int],
    full_batch: bool = False,
) -> list[dict[str, Tensor]]:
    """Trains N networks by Adam on the class-balanced loss.

    A sample weighs `1 / (share of its class in the network's training labels * classes present)`, so that every
    class weighs the same over an epoch. The networks do not touch each other: the result is that of N loops of
    one network each. The module's own values stay as they are; its mode (train or eval) is the one trained in.

    Args:
        module: Any network of the architecture.
        start_N: Where each starts: a `state_dict` whose tensors have a leading dimension N.
        x: Training inputs `(S, F)` for all networks, or `(N, S, F)`.
        labels_NS: int64 `(N, S)`, or `(S,)` for all networks.
        num_steps: Optimiser steps.
        batch_size: T; all S samples where there are fewer.
        learning_rate: Of Adam.
        order_seeds: N seeds of data order: a fresh permutation each epoch, whose last incomplete batch is left out.
        record_steps: Steps after which the weights are kept, from 0 (the start) to `num_steps`.
        full_batch: Every step takes all samples; no order, hence no seed, matters then.

    Returns:
        The stacked `state_dict` after each of `record_steps`, in their order.
    """
    num_networks = len(order_seeds)
    assert all(len(tensor) == num_networks for tensor in start_N.values()), "one start and one order seed a network"
    assert all(0 <= step <= num_steps for step in record_steps), f"record_steps must lie in 0 to {num_steps}"
    state_N = {name: tensor.detach().clone() for name, tensor in start_N.items()}
    # Buffers are part of the state, but the network itself writes them.
    trained = [state_N[name].requires_grad_() for name, _ in module.named_parameters()]
    optimizer = torch.optim.Adam(trained, lr=learning_rate)
    labels_NS = labels_NS.expand(num_networks, -1)
    weights_NS = _sample_weights(labels_NS)
    rows_N1 = torch.arange(num_networks).unsqueeze(1)
    order = None if full_batch else _minibatches(order_seeds, labels_NS.shape[1], batch_size)
    recorded = {0: _snapshot(state_N)} if 0 in record_steps else {}
    for step in range(1, num_steps + 1):
        if order is None:
            loss_NT = _losses(module, state_N, x, labels_NS) * weights_NS
        else:
            index_NT = next(order)
            x_NTF = x[index_NT] if x.dim() == 2 else x[rows_N1, index_NT]
            loss_NT = _losses(module, state_N, x_NTF, labels_NS.gather(1, index_NT)) * weights_NS.gather(1, index_NT)
        optimizer.zero_grad()
        loss_NT.mean(dim=1).sum().backward()
        optimizer.step()
        if step in record_steps:
            recorded[step] = _snapshot(state_N)
    return [recorded[step] for step in record_steps]


def repeat_state(state: dict[str, Tensor], num: int) -> dict[str, Tensor]:
    """The same `state_dict` for `num` networks, as a stack with tensors `(num, ...)` of its own memory."""
    return {name: tensor.detach().expand(num, *tensor.shape).clone() for name, tensor in state.items()}


def _losses(module: nn.Module, state_N: dict[str, Tensor], x: Tensor, labels_NT: Tensor) -> Tensor:
    logits_NTC = stacked_logits(module, state_N, x)
    return nn.functional.cross_entropy(logits_NTC.transpose(1, 2), labels_NT, reduction="none")


def _minibatches(seeds: Sequence[int], num_samples: int, batch_size: int) -> Iterator[Tensor]:
    """Endless minibatches `(N, T)` of sample indices, each network's order by its own seed."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    num = min(batch_size, num_samples)
    while True:
        order_NS = torch.stack([torch.randperm(num_samples, generator=generator) for generator in generators])
        for first in range(0, num_samples - num + 1, num):
            yield order_NS[:, first : first + num]


def _sample_weights(labels_NS: Tensor) -> Tensor:
    """Weights `(N, S)` of mean 1 under which every class present weighs the same."""
    share_NC = nn.functional.one_hot(labels_NS).float().mean(dim=1)
    num_present_N1 = (share_NC > 0).sum(dim=1, keepdim=True)
    return 1 / (share_NC.gather(1, labels_NS) * num_present_N1)


def _snapshot(state_N: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state_N.items()}
