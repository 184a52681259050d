"""Adapters of one split of tasks by their origin, each judged with a head that is fitted to the same examples.

Shape letters beyond the legend in `raywgen.weights`: T tasks, of rows those that differ, J draws of examples for each,
N stored adapters.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from raywgen.benchmarks.lora_stored import (
    combined,
    example_features,
    instruction_features,
    nearest,
    regression_weights,
)
from raywgen.benchmarks.unseen_tasks import unseen_tasks
from raywgen.corpus import Corpus
from raywgen.generators import GenerationRequest, Generator
from raywgen.tasks import (
    FitConfig,
    FitData,
    Recorded,
    Task,
    balanced_accuracy,
    build_network,
    build_task,
    draw_few_shot,
    fit,
    repeat_state,
)
from raywgen.tasks.networks.upper_layers import UpperLayers, mean_feature
from raywgen.tasks.ridge_head import fit_ridge_head
from raywgen.weights import Condition, KeyedNoise, Layout

_STORED_STREAM = 3_001
POOLINGS = ("mean", "max", "first")
"""Ways in which one vector is made of a sentence's tokens, for a head on the encoder as it is."""
Reads = Literal["both", "text", "examples"]
_PERCENT, _MILLISECONDS = 100.0, 1e3
_SENTENCES_AT_ONCE = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The adapters of one origin.

    Attributes:
        accuracy_TJ: Balanced test accuracy of each task and draw of examples, in [0, 1].
        milliseconds: CPU milliseconds that an adapter takes; 0 where none is made for a task.
    """

    accuracy_TJ: Tensor
    milliseconds: float = 0.0

    @property
    def percent(self) -> float:
        """The mean in percent."""
        return _PERCENT * float(self.accuracy_TJ.mean())

    @property
    def error(self) -> float:
        """The standard error of that mean, in percent: of a single task over its draws, of one value unknown."""
        value_X = self.accuracy_TJ.mean(dim=1) if len(self.accuracy_TJ) > 1 else self.accuracy_TJ[0]
        return _PERCENT * float(value_X.std()) / len(value_X) ** 0.5 if len(value_X) > 1 else math.nan

    def minus(self, other: Row) -> Row:
        """Returns the differences to another row, task by task and draw by draw."""
        return Row(accuracy_TJ=self.accuracy_TJ - other.accuracy_TJ)


class _Known(NamedTuple):
    """Features by which stored adapters and new tasks are compared.

    Attributes:
        stored_ND: The stored adapters.
        stored_NE: Features of their tasks' instructions, then of their examples.
        features_TE: The same of the new tasks.
    """

    stored_ND: Tensor
    stored_NE: Tensor
    features_TE: Tensor


class AdapterRows:
    """Tasks of a split with the same labelled examples for all.

    Args:
        corpus: The zoo.
        split: `validation` or `unseen`.
        shot: Examples of each class.
        seed: Keys the examples.
        draws: Times that examples are drawn for each task.
    """

    def __init__(self, corpus: Corpus, split: str, shot: int, seed: int, draws: int = 1) -> None:
        (network,) = corpus.networks.values()
        self.recipe = network.recipe
        self.unseen = unseen_tasks(corpus, split, shot, seed, draws)
        self.layout, self.tasks = self.unseen.layout, self.unseen.tasks
        self.conditions = [self.unseen.condition_of(index) for index in range(len(self.tasks))]
        self._corpus, self._seed, self._shot, self._draws = corpus, seed, shot, draws

    def head(self, pooling: str = POOLINGS[0]) -> Row:
        """Judges the features of the encoder as it is.

        Args:
            pooling: `mean` or `max` over a sentence's tokens, or its `first` token.
        """
        base = build_network({**self.recipe["base"], "num_classes": 0, "head": "trained"}).eval()
        assert isinstance(base, UpperLayers)
        scores = []
        for task, condition in zip(self.tasks, self.conditions, strict=True):
            head = fit_ridge_head(
                _pooled(base, condition.samples_BSF[0], pooling).unsqueeze(0), condition.labels_BS, task.num_classes
            )
            outputs = head(_pooled(base, task.test_x_SF, pooling).unsqueeze(0))
            scores.append(balanced_accuracy(outputs, task.test_y_S))
        return self._row(torch.cat(scores))

    def judged(self, values_TD: Tensor, milliseconds: float = 0.0) -> Row:
        """Judges an adapter of each task."""
        return self._row(self.unseen.accuracy(values_TD), milliseconds)

    def _row(self, accuracy_T: Tensor, milliseconds: float = 0.0) -> Row:
        return Row(accuracy_TJ=accuracy_T.view(-1, self._draws), milliseconds=milliseconds)

    def one_for_all(self, values_D: Tensor) -> Row:
        """Judges the same adapter on all tasks."""
        return self.judged(values_D.expand(len(self.tasks), -1))

    def written(self, generator: Generator, shift: int = 0, reads: Reads = "both") -> Row:
        """Judges what a generator writes, one task after another, as it is used.

        Args:
            generator: The generator.
            shift: By how many places the condition is another task's; its own examples still fit the head.
            reads: What the generator reads of the condition; the examples fit the head all the same.
        """
        return self.judged(*written_adapters(generator, self.conditions, self.layout, self._seed, shift, reads))

    def stored(self) -> tuple[Tensor, list[str]]:
        """Returns the ends of trajectories `(N, D)` of seen tasks, and the task of each."""
        last = max(self._corpus.facts.column("step").to_pylist())
        facts = self._corpus.query(["split=train", f"step={last}"])
        return self._corpus.values(facts), facts.column("task_id").to_pylist()

    def trained_on_all(self) -> Row:
        """Judges the adapters that the zoo trained on all training sentences of these tasks."""
        return self.judged(self.unseen.originals_TD)

    def nearest_by_loss(self) -> Row:
        """Judges, for each task, the stored adapter whose left-out examples have the lowest loss."""
        stored_ND, _ = self.stored()
        begin = time.process_time()
        place_T = self.unseen.best_of(stored_ND)
        taken = _MILLISECONDS * (time.process_time() - begin) / len(self.tasks)
        return self.judged(stored_ND[place_T], taken)

    def nearest_by_text(self) -> Row:
        """Judges, for each task, the stored adapter whose instruction is the most similar to its own."""
        known, num = self._known, self.tasks[0].num_condition_features
        return self._timed(lambda new_TE: known.stored_ND[nearest(new_TE[:, :num], known.stored_NE[:, :num])])

    def regression(self, strength: float) -> Row:
        """Judges ridge regression from instruction and examples to products of stored adapters."""
        known = self._known
        return self._timed(
            lambda new_TE: combined(self.layout, known.stored_ND, regression_weights(new_TE, known.stored_NE, strength))
        )

    def _timed(self, write: Callable[[Tensor], Tensor]) -> Row:
        """Judges what is written from features of conditions, which come from the encoder before the clock starts."""
        features_TE = self._known.features_TE
        write(features_TE[:1])  # The first time pays for what a process does once.
        begin = time.process_time()
        values_TD = write(features_TE)
        return self.judged(values_TD, _MILLISECONDS * (time.process_time() - begin) / len(self.tasks))

    @cached_property
    def _known(self) -> _Known:
        stored_ND, ids = self.stored()
        tasks = [build_task(self._corpus.tasks[name].recipe) for name in ids]
        drawn = [
            draw_few_shot([task], self._shot, 1, KeyedNoise(self._seed, torch.tensor([index]), _STORED_STREAM))[0]
            for index, task in enumerate(tasks)
        ]
        features_XE = self._features([*tasks, *self.tasks], [*drawn, *self.conditions])
        return _Known(stored_ND, features_XE[: len(tasks)], features_XE[len(tasks) :])

    def _features(self, tasks: Sequence[Task], conditions: Sequence[Condition]) -> Tensor:
        num = self.tasks[0].num_condition_features
        examples_TE = torch.cat([example_features(condition, num) for condition in conditions])
        return torch.cat(
            [instruction_features([task.instruction for task in tasks], self.tasks[0]), examples_TE], dim=1
        )

    def gradient(self, start_D: Tensor, rates: Sequence[float], steps: Sequence[int]) -> dict[tuple[float, int], Row]:
        """Trains adapter and head on the examples alone, and judges them by rate and number of steps."""
        return {(rate, num): self._gradient(start_D, rate, num) for rate in rates for num in steps}

    def _gradient(self, start_D: Tensor, rate: float, num_steps: int) -> Row:
        config = FitConfig(learning_rate=rate, num_steps=num_steps, batch_size=32, loss="balanced", schedule="cosine")
        start = Recorded(step=0, state_N=repeat_state(self.layout.unflatten(start_D), 1))
        begin, values = time.process_time(), []
        for index, condition in enumerate(self.conditions):
            data = FitData(x=condition.samples_BSF[0], labels_NS=condition.labels_BS)
            (end,) = fit(
                self.unseen.module,
                start,
                data,
                config,
                order_seeds=[index],
                record_steps=[num_steps],
                execution="sequential",
            )
            values.append(self.unseen.flat(end)[0])
        taken = _MILLISECONDS * (time.process_time() - begin) / len(self.tasks)
        return self.judged(torch.stack(values), taken)


def written_adapters(
    generator: Generator,
    conditions: Sequence[Condition],
    layout: Layout,
    seed: int,
    shift: int = 0,
    reads: Reads = "both",
) -> tuple[Tensor, float]:
    """Writes an adapter for each condition, one after another, as a generator is used.

    Args:
        generator: The generator.
        conditions: Conditions of one task each.
        layout: Layout of the adapters.
        seed: Keys the noise.
        shift: By how many places the condition is another task's.
        reads: What the generator reads of the condition.

    Returns:
        Flat vectors `(T, D)`, and the CPU milliseconds that one of them takes.
    """
    rows, begin = [], 0.0
    for index in range(-1, len(conditions)):  # The first time pays for what a process does once.
        if index == 0:
            begin = time.process_time()
        condition = conditions[(max(index, 0) + shift) % len(conditions)]
        if reads != "both":
            condition = condition.reading(instruction=reads == "text", samples=reads == "examples")
        noise = KeyedNoise(seed, torch.tensor([max(index, 0)]), 0)
        request = GenerationRequest(condition=condition, layout=layout, noise=noise, temperature=0.0)
        rows.append(generator.generate(request).values_BD[0])
    taken = _MILLISECONDS * (time.process_time() - begin) / len(conditions)
    return torch.stack(rows[1:]), taken


@torch.no_grad()
def _pooled(base: UpperLayers, x_SF: Tensor, pooling: str) -> Tensor:
    """Returns features `(S, H)` of sentences by the frozen encoder, with a mean square of 1."""
    parts = []
    for part_SF in x_SF.split(_SENTENCES_AT_ONCE):
        hidden_STH, is_real_ST = base.last_hidden(part_SF)
        if pooling == "mean":
            parts.append(mean_feature(hidden_STH, is_real_ST))
            continue
        largest_SH = hidden_STH.masked_fill(~is_real_ST.unsqueeze(-1), -torch.inf).amax(dim=1)
        chosen_SH = largest_SH if pooling == "max" else hidden_STH[:, 0]
        parts.append(nn.functional.rms_norm(chosen_SH, chosen_SH.shape[-1:], eps=1e-12))
    return torch.cat(parts)
