"""Tasks that nothing was trained on, their conditions, and gradient training on them as a baseline.

Shape letters beyond the legend in `raywgen.weights`: T tasks, N stored networks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from raywgen.corpus import Corpus
from raywgen.tasks import (
    FitConfig,
    FitData,
    Recorded,
    Task,
    balanced_accuracy,
    balanced_cross_entropy,
    build_network,
    build_task,
    draw_few_shot,
    fit,
    repeat_state,
    stacked_logits,
)
from raywgen.tasks.fitted_head import fits_head, with_fitted_heads
from raywgen.weights import Condition, KeyedNoise, Layout

_CONDITION_STREAM = 3_000
_PERCENT = 100.0
_MILLISECONDS = 1e3
_STACK = 64
_SAMPLES_AT_ONCE = 512
_MOST_STEPS = 400
_EVERY = 5
_NUM_TIMED_TASKS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class UnseenTasks:
    """The tasks of one split with the labelled examples that all methods are given.

    Attributes:
        layout: Layout of the networks.
        module: One of the networks.
        tasks: T tasks, whose test sets may differ in size.
        condition: The examples, T sets.
        originals_TD: Networks trained on each task itself.
    """

    layout: Layout
    module: nn.Module
    tasks: list[Task]
    condition: Condition
    originals_TD: Tensor

    def condition_of(self, index: int) -> Condition:
        """Returns the condition of one task."""
        rows = slice(index, index + 1)
        return Condition(
            instructions=self.condition.instructions[rows],
            samples_BSF=self.condition.samples_BSF[rows],
            labels_BS=self.condition.labels_BS[rows],
        )

    def told_the_next_task(self) -> UnseenTasks:
        """Returns tasks of which each has the condition of the next."""
        return replace(self, condition=self.condition.take(torch.arange(len(self.tasks)).roll(-1)))

    @torch.no_grad()
    def accuracy(self, values_TD: Tensor) -> Tensor:
        """Returns the balanced accuracy `(T,)` on the test samples, in [0, 1]; heads that are fitted are so first."""
        scores = []
        for index, task in enumerate(self.tasks):
            own_1D, parts, condition = values_TD[index : index + 1], (task.test_x_SF,), self.condition_of(index)
            if fits_head(self.module):
                examples = condition.samples_BSF, condition.labels_BS
                own_1D, _ = with_fitted_heads(self.module, self.layout, own_1D, *examples)
                parts = task.test_x_SF.split(_SAMPLES_AT_ONCE)  # Features of sentences need much memory.
            state = self.layout.unflatten(own_1D)
            logits_1SC = torch.cat([stacked_logits(self.module, state, x_SF) for x_SF in parts], dim=1)
            scores.append(balanced_accuracy(logits_1SC, task.test_y_S))
        return torch.cat(scores)

    def percent(self, values_TD: Tensor) -> float:
        """Returns the mean accuracy over tasks in percent."""
        return _PERCENT * float(self.accuracy(values_TD).mean())

    @torch.no_grad()
    def best_of(self, stored_ND: Tensor) -> Tensor:
        """Returns the index, among N networks, of the lowest loss on each task's examples, int64 `(T,)`."""
        return torch.stack([self.example_loss(index, stored_ND) for index in range(len(self.tasks))]).argmin(dim=1)

    @torch.no_grad()
    def example_loss(self, index: int, values_ND: Tensor) -> Tensor:
        """Returns the balanced loss `(N,)` of N networks on one task's examples.

        Heads that are fitted are judged on each example by the head that is fitted to all others.
        """
        condition = self.condition_of(index)
        x_1SF, labels_1S = condition.samples_BSF, condition.labels_BS
        if fits_head(self.module):
            logits = [
                with_fitted_heads(self.module, self.layout, one_1D, x_1SF, labels_1S)[1]
                for one_1D in values_ND.split(1)
            ]
        else:
            parts = values_ND.split(_STACK)
            logits = [stacked_logits(self.module, self.layout.unflatten(part_ND), x_1SF[0]) for part_ND in parts]
        return torch.cat([balanced_cross_entropy(part_NSC, labels_1S[0]) for part_NSC in logits])

    def flat(self, recorded: Recorded) -> Tensor:
        """Returns flat vectors `(N, D)` of recorded networks."""
        num = len(next(iter(recorded.state_N.values())))
        states = [{name: tensor[n] for name, tensor in recorded.state_N.items()} for n in range(num)]
        return torch.stack([self.layout.flatten(state) for state in states])


def unseen_tasks(corpus: Corpus, split: str, shot: int, seed: int, draws: int = 1) -> UnseenTasks:
    """Builds the tasks of a split of a corpus with one layout.

    Args:
        corpus: The zoo.
        split: Its split.
        shot: Examples of each class.
        seed: Keys the examples.
        draws: Times that examples are drawn for each task, which is that often among the tasks.
    """
    (layout_id,) = corpus.networks
    network = corpus.networks[layout_id]
    facts = [task for task in corpus.tasks.values() if task.split == split for _ in range(draws)]
    tasks = [build_task(task.recipe) for task in facts]
    # One by one, as tasks may differ in size.
    drawn = [
        draw_few_shot([task], shot, 1, KeyedNoise(seed, torch.tensor([index]), _CONDITION_STREAM))[0]
        for index, task in enumerate(tasks)
    ]
    rows = corpus.select(split=split).sort_by("step").to_pylist()
    last = {row["task_id"]: row["checkpoint_id"] for row in rows}
    ids = corpus.facts.column("checkpoint_id").to_pylist()
    place = {name: index for index, name in enumerate(ids)}
    return UnseenTasks(
        layout=network.layout,
        module=build_network(network.recipe).eval(),
        tasks=tasks,
        condition=Condition.join(drawn),
        originals_TD=corpus.values(corpus.facts.take([place[last[task.task_id]] for task in facts])),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """Mean accuracy in percent by learning rate and number of steps."""

    percent: dict[tuple[float, int], float]

    def best(self) -> tuple[float, int]:
        """Returns rate and steps of the highest accuracy."""
        return max(self.percent, key=lambda key: self.percent[key])


def fitted(tasks: UnseenTasks, start_D: Tensor, rates: Sequence[float], steps: Sequence[int]) -> Fitted:
    """Trains by Adam from a start on the labelled examples alone, all of them in each step."""
    num = len(tasks.tasks)
    data = FitData(x=tasks.condition.samples_BSF, labels_NS=tasks.condition.labels_BS)
    start = Recorded(step=0, state_N=repeat_state(tasks.layout.unflatten(start_D), num))
    percent = {}
    for rate in rates:
        config = FitConfig(
            learning_rate=rate, num_steps=max(steps), batch_size=tasks.condition.labels_BS.shape[1], loss="balanced"
        )
        recorded = fit(
            tasks.module,
            start,
            data,
            config,
            order_seeds=range(num),
            record_steps=sorted(steps),
            execution="sequential",
        )
        for one in recorded:
            percent[rate, one.step] = tasks.percent(tasks.flat(one))
    return Fitted(percent=percent)


@dataclass(frozen=True, slots=True, kw_only=True)
class FullyTrained:
    """The cost of reaching an accuracy by gradient training on all of a task's samples; infinite if never reached."""

    rate: float
    steps: float
    milliseconds: float


def fully_trained(tasks: UnseenTasks, start_D: Tensor, rates: Sequence[float], written_TD: Tensor) -> FullyTrained:
    """Finds the fewest steps, over rates, after which the mean accuracy is that of written networks, and their time.

    It is measured on the first tasks. The time is that of the steps alone, without evaluation between them.
    """
    best = FullyTrained(rate=rates[0], steps=float("inf"), milliseconds=float("inf"))
    record = list(range(_EVERY, _MOST_STEPS + 1, _EVERY))
    chosen = tasks.tasks[:_NUM_TIMED_TASKS]
    few = replace(tasks, tasks=chosen, originals_TD=tasks.originals_TD[: len(chosen)])
    goal = few.percent(written_TD[: len(chosen)])
    for rate in rates:
        config = FitConfig(learning_rate=rate, num_steps=_MOST_STEPS, batch_size=64, loss="plain")
        runs = [_fit_alone(few, index, start_D, config, record) for index in range(len(chosen))]
        for place, step in enumerate(record):
            level = few.percent(torch.stack([run[place] for run in runs]))
            if level >= goal and step < best.steps:
                per_step = _milliseconds_per_step(few, start_D, config)
                best = FullyTrained(rate=rate, steps=step, milliseconds=step * per_step)
                break
    return best


def _fit_alone(tasks: UnseenTasks, index: int, start_D: Tensor, config: FitConfig, record: list[int]) -> list[Tensor]:
    task = tasks.tasks[index]
    start = Recorded(step=0, state_N=repeat_state(tasks.layout.unflatten(start_D), 1))
    data = FitData.joined([task.train_inputs], task.train_y_S)
    recorded = fit(tasks.module, start, data, config, order_seeds=[index], record_steps=record, execution="sequential")
    return [tasks.flat(one)[0] for one in recorded]


def _milliseconds_per_step(tasks: UnseenTasks, start_D: Tensor, config: FitConfig) -> float:
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        _fit_alone(tasks, 0, start_D, replace(config, num_steps=50), [50])
        times.append(time.perf_counter() - begin)
    return _MILLISECONDS * sorted(times)[1] / 50
