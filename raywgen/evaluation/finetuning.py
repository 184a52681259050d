"""Fine-tunes networks from several starts under equal conditions, and counts the epochs to an accuracy.

Every start gets the same optimiser, the same data order and the same learning rates to choose from. Part of the
training samples is held out to choose one rate for each start: the one with the highest validation accuracy, averaged
over all epochs, so that an early rise counts as much as a high end. The start is then trained at that rate on all
training samples. Test samples are not used for any choice.

Shape letters beyond the legend in `raywgen.weights`: A starts, T tasks, N networks (T of each start), E epochs + 1.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from raywgen.tasks import FitConfig, FitData, Inputs, Recorded, Task, balanced_accuracy, fit
from raywgen.tasks.train_loop import Execution
from raywgen.weights import Layout
from raywgen.zoo.measure import network_logits

OnProgress = Callable[[int, int], None]


class FineTuningError(ValueError):
    """Starts or tasks cannot be fine-tuned with these settings; the message says why."""


@dataclass(kw_only=True)
class FineTuningConfig:
    """The settings by which every start is fine-tuned.

    Attributes:
        epochs: Passes over the task's training samples.
        epoch_samples: Samples of an epoch where a task has more; 0 for all.
        learning_rates: Learning rates to choose from: each start gets the one that is best on its validation samples.
        validation: Share of the training samples that is held out for this choice.
        fit: Optimiser, loss and batch size; its learning rate and number of steps follow from the settings above.
        execution: `stacked` trains all networks at once, `sequential` one after another in channels-last.
        seed: Seed of data orders and of the held-out samples.
    """

    epochs: int = 25
    epoch_samples: int = 0
    learning_rates: list[float] = field(default_factory=lambda: [1e-3, 3e-3, 1e-2, 3e-2])
    validation: float = 0.2
    fit: FitConfig = field(default_factory=FitConfig)
    execution: Execution = "stacked"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or not self.learning_rates or min(self.learning_rates) <= 0:
            raise ValueError(f"epochs={self.epochs}, learning_rates={self.learning_rates}: give some, all above 0")
        if self.epoch_samples < 0:
            raise ValueError(f"epoch_samples={self.epoch_samples}: give a number of samples, or 0 for all")
        if not 0 < self.validation < 1:
            raise ValueError(f"validation={self.validation}: must lie between 0 and 1")
        if self.execution not in ("stacked", "sequential"):
            raise ValueError(f"execution={self.execution}: give stacked or sequential")
        if self.fit.schedule != "constant":
            raise ValueError(f"fit.schedule={self.fit.schedule}: epochs are compared at a constant rate; leave it out")


@dataclass(frozen=True, slots=True, kw_only=True)
class FineTuned:
    """The result of fine-tuning from one start.

    Attributes:
        accuracy_TE: Balanced test accuracy after 0, 1, ... epochs, `(T, epochs + 1)` in [0, 1].
        learning_rate: The chosen learning rate.
        validation_accuracy: Validation accuracy of each rate; empty where there was only one.
        values_TD: Weights after the last epoch.
    """

    accuracy_TE: Tensor
    learning_rate: float
    validation_accuracy: dict[float, float]
    values_TD: Tensor

    def epochs_to(self, accuracy: float | Tensor) -> Tensor:
        """Returns the first epoch with this accuracy (one for all tasks, or `(T,)`), float `(T,)`; inf for never."""
        reached_TE = self.accuracy_TE >= torch.as_tensor(accuracy).view(-1, 1)
        first_T = reached_TE.int().argmax(dim=1).float()
        return first_T.masked_fill(~reached_TE.any(dim=1), torch.inf)


def fine_tune(
    module: nn.Module,
    layout: Layout,
    starts: Mapping[str, Tensor],
    tasks: Sequence[Task],
    config: FineTuningConfig,
    on_progress: OnProgress | None = None,
) -> dict[str, FineTuned]:
    """Fine-tunes every start on every task, independently of each other.

    Args:
        module: Any network of the layout; its own values stay as they are.
        layout: Layout of the starts.
        starts: Name -> one flat vector a task `(T, D)`.
        tasks: T tasks.
        config: Settings of the training.
        on_progress: Called with the epochs done, over all networks, and their total number.

    Returns:
        The result of each start, in their order.

    Raises:
        FineTuningError: There is no start or no task, a start has another shape, or a task has too few samples to
            hold some out.
    """
    _check(layout, starts, tasks)
    rates = config.learning_rates
    num_runs = len(starts) * len(tasks) * (len(rates) + 1 if len(rates) > 1 else 1)
    trainer = _Trainer(module, layout, config, num_runs * config.epochs, on_progress)
    groups = _groups(tasks)
    scores: dict[str, dict[float, float]] = {name: {} for name in starts}
    if len(rates) > 1:
        halves = [_validation_half(group, config) for group in groups]
        for rate in rates:
            for name, (accuracy_TE, _) in trainer.train(starts, halves, rate).items():
                scores[name][rate] = float(accuracy_TE.mean())
    chosen = {name: max(score, key=lambda rate: score[rate]) if score else rates[0] for name, score in scores.items()}
    tuned: dict[str, FineTuned] = {}
    for rate in dict.fromkeys(chosen.values()):
        of_rate = {name: start_TD for name, start_TD in starts.items() if chosen[name] == rate}
        for name, (accuracy_TE, values_TD) in trainer.train(of_rate, groups, rate).items():
            tuned[name] = FineTuned(
                accuracy_TE=accuracy_TE, learning_rate=rate, validation_accuracy=scores[name], values_TD=values_TD
            )
    return {name: tuned[name] for name in starts}


@dataclass(frozen=True, slots=True)
class _Group:
    """Tasks that share their inputs, so that these are stored once and not for each network."""

    members: list[int]
    inputs: Inputs
    y_TS: Tensor
    judge_inputs: Inputs
    judge_y_TS: Tensor


class _Trainer:
    """Trains stacks of networks epoch by epoch, so that memory holds the weights of one epoch and not of all."""

    def __init__(
        self, module: nn.Module, layout: Layout, config: FineTuningConfig, total: int, on_progress: OnProgress | None
    ) -> None:
        self._module = copy.deepcopy(module)
        self._layout, self._config = layout, config
        self._total, self._done, self._on_progress = total, 0, on_progress

    def train(
        self, starts: Mapping[str, Tensor], groups: Sequence[_Group], rate: float
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Returns each start's accuracy on its test samples `(T, epochs + 1)`, and weights in the end `(T, D)`."""
        start_ATD = torch.stack(list(starts.values()))
        accuracy_ATE = torch.empty(*start_ATD.shape[:2], self._config.epochs + 1)
        end_ATD = torch.empty_like(start_ATD)
        for group in groups:
            accuracy_NE, end_ND = self._train_group(start_ATD[:, group.members].flatten(0, 1), group, rate)
            shape = (len(starts), len(group.members), -1)
            accuracy_ATE[:, group.members], end_ATD[:, group.members] = accuracy_NE.view(shape), end_ND.view(shape)
        return {name: (accuracy_ATE[index], end_ATD[index]) for index, name in enumerate(starts)}

    def _train_group(self, start_ND: Tensor, group: _Group, rate: float) -> tuple[Tensor, Tensor]:
        num_starts = len(start_ND) // len(group.members)
        data = FitData.joined([group.inputs], group.y_TS.repeat(num_starts, 1))
        judge = FitData.joined([group.judge_inputs], group.judge_y_TS.repeat(num_starts, 1))
        batch_size = min(self._config.fit.batch_size, len(group.inputs))
        epoch_samples = min(self._config.epoch_samples or len(group.inputs), len(group.inputs))
        steps = max(1, epoch_samples // batch_size)
        # The data order depends on the task's number alone, not on its start or on the other tasks.
        seeds = [self._config.seed + member for member in group.members] * num_starts
        state = Recorded(step=0, state_N=self._layout.unflatten(start_ND))
        curve = [self._accuracy(state, judge)]
        for epoch in range(1, self._config.epochs + 1):
            (state,) = fit(
                self._module.train(),
                state,
                data,
                replace(self._config.fit, learning_rate=rate, num_steps=epoch * steps, batch_size=batch_size),
                order_seeds=seeds,
                record_steps=[epoch * steps],
                execution=self._config.execution,
                keep_optimizer=True,
            )
            curve.append(self._accuracy(state, judge))
            self._report(len(start_ND))
        flat = [state.state_N[spec.name].flatten(1).float() for spec in self._layout.generated]
        return torch.stack(curve, dim=1), torch.cat(flat, dim=1)

    def _accuracy(self, state: Recorded, data: FitData) -> Tensor:
        logits_NSC = network_logits(self._module.eval(), state.state_N, data.x, self._config.execution, data.rows_NS)
        return balanced_accuracy(logits_NSC, data.labels_NS)

    def _report(self, num: int) -> None:
        self._done += num
        if self._on_progress is not None:
            self._on_progress(self._done, self._total)


def _groups(tasks: Sequence[Task]) -> list[_Group]:
    members: dict[tuple[Inputs, Inputs], list[int]] = {}
    for index, task in enumerate(tasks):
        members.setdefault((task.train_inputs, task.test_inputs), []).append(index)
    return [
        _Group(
            members=of_one,
            inputs=inputs,
            y_TS=torch.stack([tasks[index].train_y_S for index in of_one]),
            judge_inputs=judge_inputs,
            judge_y_TS=torch.stack([tasks[index].test_y_S for index in of_one]),
        )
        for (inputs, judge_inputs), of_one in members.items()
    ]


def _validation_half(group: _Group, config: FineTuningConfig) -> _Group:
    """Returns the tasks with part of their training samples held out in place of the test samples."""
    num = len(group.inputs)
    order_S = torch.randperm(num, generator=torch.Generator().manual_seed(config.seed))
    held, kept = order_S.tensor_split([round(config.validation * num)])
    if not len(held) or not len(kept):
        raise FineTuningError(
            f"a task has {num} training samples, too few to hold {config.validation:g} of them out; "
            "give one learning rate"
        )
    return replace(
        group,
        inputs=group.inputs.part(kept),
        y_TS=group.y_TS[:, kept],
        judge_inputs=group.inputs.part(held),
        judge_y_TS=group.y_TS[:, held],
    )


def _check(layout: Layout, starts: Mapping[str, Tensor], tasks: Sequence[Task]) -> None:
    if not starts or not tasks:
        raise FineTuningError(f"{len(starts)} starts and {len(tasks)} tasks: give at least one of each")
    for name, start_TD in starts.items():
        if start_TD.shape != (len(tasks), layout.num_values):
            raise FineTuningError(
                f"start '{name}' has shape {list(start_TD.shape)}; give {[len(tasks), layout.num_values]}"
            )
