"""Fits N networks of one architecture, as a stack at once or one after another; each has its own data order.

Shape legend: N networks, S samples, X samples that tasks share, F features, T samples of a minibatch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from raywgen.tasks.augment import augment
from raywgen.tasks.base import Inputs
from raywgen.tasks.fit_config import FitConfig
from raywgen.tasks.sam import ascend, descend
from raywgen.tasks.trainable_parameters import Alone, Stack, Trainee

Execution = Literal["stacked", "sequential"]
EXECUTIONS: tuple[Execution, ...] = get_args(Execution)
OnStep = Callable[[int, int], None]
"""A function that is called with steps done and steps to do, summed over networks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitData:
    """The data that N networks are fitted to.

    Attributes:
        x: Training inputs `(S, F)` for all networks, or `(N, S, F)`; with `rows_NS`, the `(X, F)` that hold their rows.
        labels_NS: Labels, int64; `(1, S)` or `(S,)` for all networks.
        rows_NS: Rows of `x`, int64; `(1, S)` for all networks.
    """

    x: Tensor
    labels_NS: Tensor
    rows_NS: Tensor | None = None

    @classmethod
    def joined(cls, inputs: Sequence[Inputs], labels_NS: Tensor) -> FitData:
        """Collects the data of N networks with a task each; inputs are copied only if tasks of several data sets meet.

        Args:
            inputs: One entry for all networks, or N equally long ones.
            labels_NS: Labels, int64.
        """
        different = list(dict.fromkeys(inputs))
        each = inputs if len(different) > 1 else different
        rows = [one.rows_S for one in each if one.rows_S is not None]
        if len({id(one.x_XF) for one in each}) == 1 and len(rows) in (0, len(each)):
            rows_NS = torch.stack(rows) if rows else None
            return cls(x=each[0].x_XF, labels_NS=labels_NS, rows_NS=rows_NS)
        return cls(x=torch.stack([one[:] for one in each]), labels_NS=labels_NS)

    def first(self, num: int) -> FitData:
        """Returns the first samples alone."""
        return replace(
            self,
            x=self.x[..., :num, :] if self.rows_NS is None else self.x,
            labels_NS=self.labels_NS[..., :num],
            rows_NS=None if self.rows_NS is None else self.rows_NS[:, :num],
        )

    def of(self, index: int, num: int) -> FitData:
        """Returns the data that one of `num` networks is fitted to."""
        own = slice(index, index + 1)
        return replace(
            self,
            x=self.x[index] if self.x.dim() == 3 else self.x,
            labels_NS=self.labels_NS.expand(num, -1)[own],
            rows_NS=None if self.rows_NS is None else self.rows_NS.expand(num, -1)[own],
        )

    def batch(self, index_NT: Tensor) -> Tensor:
        """Returns inputs `(N, T, F)` of samples of each network."""
        if self.rows_NS is not None:
            return self.x[self.rows_NS.expand(len(index_NT), -1).gather(1, index_NT)]
        return self.x[index_NT] if self.x.dim() == 2 else self.x[torch.arange(len(index_NT)).unsqueeze(1), index_NT]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """N networks after a step.

    Attributes:
        step: Number of steps taken; 0 at the start.
        state_N: A `state_dict` whose tensors have a leading dimension N.
        optimizer_N: The optimiser's tensors, named `KEY/PARAMETER`, stacked likewise; empty unless they are kept.
    """

    step: int
    state_N: dict[str, Tensor]
    optimizer_N: dict[str, Tensor] = field(default_factory=dict)


def fit(
    module: nn.Module,
    start: Recorded,
    data: FitData,
    config: FitConfig,
    *,
    order_seeds: Sequence[int],
    record_steps: Sequence[int],
    execution: Execution = "stacked",
    keep_optimizer: bool = False,
    on_step: OnStep | None = None,
) -> list[Recorded]:
    """Trains N networks that do not touch each other: the result is that of N loops of one network each.

    The module's own values stay as they are; its mode (train or eval) is the one trained in.

    Args:
        module: Any network of the architecture.
        start: Start of each network; training goes on from a step above 0, given the optimiser's tensors.
        data: The samples.
        config: Optimiser, loss, steps.
        order_seeds: N seeds of data order (a fresh permutation each epoch, whose last incomplete batch is left out)
            and of augmentation.
        record_steps: Steps to record, from the start's to `num_steps`.
        execution: `stacked` trains all networks at once, `sequential` one after another with images in channels-last.
        keep_optimizer: Whether the optimiser's tensors are recorded, too.
        on_step: Called after every step with the steps done so far and those of the whole call, each counted once for
            every network that takes it.

    Returns:
        One entry for each of `record_steps`, in their order.
    """
    num = len(order_seeds)
    assert all(len(tensor) == num for tensor in start.state_N.values()), "one start and one order seed a network"
    assert all(start.step <= step <= config.num_steps for step in record_steps), "record_steps lie out of the run"
    steps_each = config.num_steps - start.step

    def count(first: int, at_once: int) -> Callable[[int], None]:
        """Turns the steps of one loop into steps of the whole call."""
        total = num * steps_each
        return lambda step: on_step(first * steps_each + at_once * (step - start.step), total) if on_step else None

    if execution == "stacked":
        trainee = Stack(module, start.state_N)
        recorded = _run(trainee, start, data, config, order_seeds, record_steps, keep_optimizer, count(0, num))
        return [recorded[step] for step in record_steps]
    parts = []
    for index, seed in enumerate(order_seeds):
        one = Recorded(
            step=start.step,
            state_N={name: tensor[index] for name, tensor in start.state_N.items()},
            optimizer_N={name: tensor[index : index + 1] for name, tensor in start.optimizer_N.items()},
        )
        trainee, own = Alone(module, one.state_N), data.of(index, num)
        parts.append(_run(trainee, one, own, config, [seed], record_steps, keep_optimizer, count(index, 1)))
    return [_joined([part[step] for part in parts]) for step in record_steps]


def repeat_state(state: dict[str, Tensor], num: int) -> dict[str, Tensor]:
    """Repeats a `state_dict` for `num` networks, as a stack with tensors `(num, ...)` in memory of its own."""
    return {name: tensor.detach().expand(num, *tensor.shape).clone() for name, tensor in state.items()}


def _run(
    trainee: Trainee,
    start: Recorded,
    data: FitData,
    config: FitConfig,
    seeds: Sequence[int],
    record_steps: Sequence[int],
    keep_optimizer: bool,
    on_step: Callable[[int], None],
) -> dict[int, Recorded]:
    optimizer = trainee.optimizer(config)
    trainee.load_optimizer(optimizer, start.optimizer_N, start.step)
    batches = _Batches(data, config, seeds, start.step)
    recorded: dict[int, Recorded] = {}

    def record(step: int) -> None:
        if step in record_steps:
            kept = trainee.optimizer_tensors(optimizer) if keep_optimizer and step else {}
            recorded[step] = Recorded(step=step, state_N=trainee.snapshot(), optimizer_N=kept)

    record(start.step)
    for step in range(start.step + 1, config.num_steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(config, step)
        x, labels_NT, weights_NT = batches.next(step)
        _backward(trainee, x, labels_NT, weights_NT)
        if config.sam.rho > 0:
            buffers = trainee.buffers()
            before = ascend(trainee.parameters, config.sam, stacked=trainee.stacked)
            _backward(trainee, x, labels_NT, weights_NT)
            descend(trainee.parameters, before)
            trainee.restore_buffers(buffers)
        optimizer.step()
        record(step)
        on_step(step)
    return recorded


def _backward(trainee: Trainee, x: Tensor, labels_NT: Tensor, weights_NT: Tensor) -> None:
    for parameter in trainee.parameters:
        parameter.grad = None
    (trainee.losses(x, labels_NT) * weights_NT).mean(dim=1).sum().backward()


def _learning_rate(config: FitConfig, step: int) -> float:
    if config.schedule == "constant":
        return config.learning_rate
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - 1) / config.num_steps))


class _Batches:
    """Draws minibatches of every network by its own seed."""

    def __init__(self, data: FitData, config: FitConfig, seeds: Sequence[int], begin: int) -> None:
        self._data = data
        self._labels_NS = data.labels_NS.expand(len(seeds), -1)
        self._config, self._seeds = config, seeds
        plain = config.loss == "plain"
        self._weights_NS = torch.ones(self._labels_NS.shape) if plain else _sample_weights(self._labels_NS)
        self._order = _minibatches(seeds, self._labels_NS.shape[1], config.batch_size, begin)

    def next(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns inputs `(N, T, F)`, and labels and weights of the samples `(N, T)`."""
        index_NT = next(self._order)
        x_NTF = self._data.batch(index_NT)
        if self._config.augment:
            changed = [
                augment(x_TF, self._config.augment, seed, step) for x_TF, seed in zip(x_NTF, self._seeds, strict=True)
            ]
            x_NTF = torch.stack(changed)
        return x_NTF, self._labels_NS.gather(1, index_NT), self._weights_NS.gather(1, index_NT)


def _minibatches(seeds: Sequence[int], num_samples: int, batch_size: int, begin: int) -> Iterator[Tensor]:
    """Yields minibatches `(N, T)` of sample indices without end, after the first `begin`."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    num = min(batch_size, num_samples)
    while True:
        order_NS = torch.stack([torch.randperm(num_samples, generator=generator) for generator in generators])
        for first in range(0, num_samples - num + 1, num):
            if begin > 0:
                begin -= 1
            else:
                yield order_NS[:, first : first + num]


def _sample_weights(labels_NS: Tensor) -> Tensor:
    """Returns weights `(N, S)` of mean 1 under which every class present weighs the same."""
    share_NC = nn.functional.one_hot(labels_NS).float().mean(dim=1)
    num_present_N1 = (share_NC > 0).sum(dim=1, keepdim=True)
    return 1 / (share_NC.gather(1, labels_NS) * num_present_N1)


def _joined(parts: Sequence[Recorded]) -> Recorded:
    return Recorded(
        step=parts[0].step,
        state_N={name: torch.cat([part.state_N[name] for part in parts]) for name in parts[0].state_N},
        optimizer_N={name: torch.cat([part.optimizer_N[name] for part in parts]) for name in parts[0].optimizer_N},
    )
