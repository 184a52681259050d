"""Judges candidate networks of one layout on the tasks of one split, all by the same labelled examples.

Shape letters beyond the legend in `raywgen.weights`: T tasks, n candidates of a task, I test images.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from raywgen.corpus import Corpus, TaskFacts
from raywgen.evaluation.stored_networks import StoredNetworks
from raywgen.generation.statistics import some_inputs, with_new_statistics
from raywgen.generators import Generated, GenerationRequest, Generator
from raywgen.tasks import (
    Task,
    balanced_accuracy,
    balanced_cross_entropy,
    build_network,
    build_task,
    stacked_logits,
)
from raywgen.tasks.fitted_head import fits_head, with_fitted_heads
from raywgen.weights import Condition, KeyedNoise, Layout, Normalizer

_STACK = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskEvaluator:
    """Tasks of one split and the means to judge networks of one layout on them.

    Attributes:
        split: `seen` or `unseen`.
        network: Name of the architecture.
        layout: Its layout.
        module: A network of it.
        normalizer: Base and scale of its weights.
        tasks: T tasks.
        condition: The T conditions, with S examples each, that generators get and that candidates are chosen by.
        originals_TD: Networks trained on these very tasks; never shown to the generator, unless `is_shown`.
        is_shown: Whether no trajectory of the tasks was held out, so that the originals are among the stored ones.
        has_start: Whether the networks share their start, which is then the normaliser's base.
        stored: The generator's training networks.
        unlabelled: Training inputs of each task `(S, F)` from which statistics of batch normalisation of candidates are
            estimated anew; None leaves them as they are.
        device: The device that runs networks; everything that is given and returned is on the CPU.
    """

    split: str
    network: str
    layout: Layout
    module: nn.Module
    normalizer: Normalizer
    tasks: list[Task]
    condition: Condition
    originals_TD: Tensor
    is_shown: bool
    has_start: bool
    stored: StoredNetworks
    unlabelled: list[Tensor] | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def told_the_next_task(self) -> TaskEvaluator:
        """Returns an evaluator in which each task has the condition, and its examples, of the next."""
        return replace(self, condition=self.condition.take(torch.arange(len(self.tasks)).roll(-1)))

    def example_loss(self, values_TnD: Tensor) -> Tensor:
        """Returns the class-balanced loss `(T, n)` on the labelled examples of each task."""
        n = values_TnD.shape[1]
        condition = self.condition.repeat(n)
        return self._map(
            values_TnD,
            lambda logits, rows: balanced_cross_entropy(logits, condition.labels_BS[rows]),
            condition.samples_BSF,
        )

    def choose(self, values_TnD: Tensor) -> Tensor:
        """Returns the candidate of each task with the lowest loss on its examples, `(T, D)`."""
        if self.unlabelled is not None:
            module, each = self._module(), zip(values_TnD.to(self.device), self.unlabelled, strict=True)
            anew = [
                with_new_statistics(module, self.layout, values_nD, x_SF.to(self.device)) for values_nD, x_SF in each
            ]
            values_TnD = torch.stack(anew).cpu()
        if fits_head(self.module):
            values_TnD, loss_Tn = self._with_fitted_heads(values_TnD)
        else:
            loss_Tn = self.example_loss(values_TnD)
        best_T = loss_Tn.argmin(dim=1)
        return values_TnD[torch.arange(len(values_TnD)), best_T]

    def accuracy(self, values_TD: Tensor) -> Tensor:
        """Returns the balanced accuracy `(T,)` on test images that nothing was trained on."""
        each = zip(self._test_logits(values_TD), self.tasks, strict=True)
        return torch.cat([balanced_accuracy(logits_IC.unsqueeze(0), task.test_y_S) for logits_IC, task in each])

    def errors(self, values_TD: Tensor) -> Tensor:
        """Marks the test images that each network gets wrong, bool `(T, I)`; false beyond those of a task."""
        each = zip(self._test_logits(values_TD), self.tasks, strict=True)
        wrong = [logits_IC.argmax(dim=-1) != task.test_y_S for logits_IC, task in each]
        return pad_sequence(wrong, batch_first=True)

    def _test_logits(self, values_TD: Tensor) -> list[Tensor]:
        """Returns outputs `(I, C)` on the test images of each task."""
        module = self._module()
        if len({len(task.test_y_S) for task in self.tasks}) == 1:
            return list(self._logits(module, values_TD, torch.stack([task.test_x_SF for task in self.tasks])))
        each = zip(values_TD.split(1), self.tasks, strict=True)
        return [self._logits(module, values_1D, task.test_x_SF)[0] for values_1D, task in each]

    def _with_fitted_heads(self, values_TnD: Tensor) -> tuple[Tensor, Tensor]:
        """Returns networks with heads fitted to the examples, and the loss `(T, n)` on these, each left out in turn."""
        module, n = self._module(), values_TnD.shape[1]
        known = self.condition.repeat(n).to(self.device)
        parts = []
        for first in range(0, len(known), _STACK):
            rows = slice(first, first + _STACK)
            values_ND, support_NSF = values_TnD.flatten(0, 1)[rows].to(self.device), known.samples_BSF[rows]
            values_ND, logits = with_fitted_heads(module, self.layout, values_ND, support_NSF, known.labels_BS[rows])
            parts.append((values_ND.cpu(), balanced_cross_entropy(logits, known.labels_BS[rows]).cpu()))
        values_ND, loss_N = (torch.cat(each) for each in zip(*parts, strict=True))
        return values_ND.view_as(values_TnD), loss_N.view(-1, n)

    def _module(self) -> nn.Module:
        """The module on the device; a copy, unless that is the CPU."""
        return self.module if self.device.type == "cpu" else copy.deepcopy(self.module).to(self.device)

    def _logits(self, module: nn.Module, values_ND: Tensor, x: Tensor) -> Tensor:
        return stacked_logits(module, self.layout.unflatten(values_ND.to(self.device)), x.to(self.device)).cpu()

    def _map(self, values_TnD: Tensor, score: Callable[[Tensor, slice], Tensor], x: Tensor) -> Tensor:
        """Scores candidates a stack at a time, so that memory stays bounded."""
        flat_ND, module = values_TnD.flatten(0, 1), self._module()
        scores = []
        for first in range(0, len(flat_ND), _STACK):
            rows = slice(first, first + _STACK)
            scores.append(score(self._logits(module, flat_ND[rows], x[rows]), rows))
        return torch.cat(scores).view(values_TnD.shape[:2])


def make_evaluator(
    corpus: Corpus,
    layout_id: str,
    split: str,
    normalizer: Normalizer,
    num_tasks: int,
    num_unlabelled: int = 0,
    device: torch.device | None = None,
) -> TaskEvaluator | None:
    """Collects everything for one split of tasks and one layout; None where it has no network of such a task.

    Args:
        corpus: Corpus of tasks and networks.
        layout_id: Id of the networks' layout.
        split: `seen` or `unseen`.
        normalizer: Base and scale of the layout.
        num_tasks: Maximum number of tasks.
        num_unlabelled: Training inputs of each task from which candidates' statistics are estimated anew; 0 for none.
        device: The device that runs networks; the CPU by default.
    """
    network = corpus.networks[layout_id]
    is_shown = split == "seen" and not corpus.select(layout_id=layout_id, split="heldout").num_rows
    originals = split if split != "seen" else "train" if is_shown else "heldout"
    named = set(corpus.select(layout_id=layout_id, split=originals).column("task_id").to_pylist())
    facts = [task for task in corpus.tasks.values() if task.split == split and task.task_id in named][:num_tasks]
    if not facts:
        return None
    tasks = [build_task(task.recipe) for task in facts]
    has_statistics = any("running" in spec.kind for spec in network.layout.generated)
    return TaskEvaluator(
        split=split,
        network=network.name,
        layout=network.layout,
        module=build_network(network.recipe),
        normalizer=normalizer.copy().cpu(),
        tasks=tasks,
        device=device or torch.device("cpu"),
        unlabelled=[some_inputs(task, num_unlabelled) for task in tasks] if num_unlabelled and has_statistics else None,
        condition=_condition(facts),
        originals_TD=_originals(corpus, layout_id, originals, [task.task_id for task in facts]),
        is_shown=is_shown,
        has_start=corpus.base_values(layout_id) is not None,
        stored=StoredNetworks.of(corpus, layout_id),
    )


def generated_candidates(
    evaluator: TaskEvaluator, generator: Generator, num: int, temperature: float, seed: int
) -> Generated:
    """Generates `num` networks per task, `(T * num, D)`; all of a task get the same condition."""
    condition = evaluator.condition.to(generator.device).repeat(num)
    noise = KeyedNoise(seed, torch.arange(len(condition), device=generator.device), 0)
    request = GenerationRequest(
        condition=condition,
        layout=evaluator.layout,
        noise=noise,
        temperature=temperature,
        normalizer=evaluator.normalizer,
    )
    return generator.generate(request).cpu()


def _condition(facts: list[TaskFacts]) -> Condition:
    return Condition(
        instructions=tuple(task.instruction for task in facts),
        samples_BSF=torch.stack([task.samples_SF for task in facts]),
        labels_BS=torch.stack([task.labels_S for task in facts]),
    )


def _originals(corpus: Corpus, layout_id: str, split: str, task_ids: list[str]) -> Tensor:
    """Returns the last checkpoint of one trajectory for each task."""
    rows = corpus.select(layout_id=layout_id, split=split, task_id=task_ids)
    rows = rows.sort_by([("order_seed", "ascending"), ("step", "ascending")])
    last = {task_id: index for index, task_id in enumerate(rows.column("task_id").to_pylist())}
    return corpus.values(rows.take([last[task_id] for task_id in task_ids]))
