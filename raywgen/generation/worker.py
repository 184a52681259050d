"""Does work items: generates candidates, keeps the best of them, and scores these.

Shape letters beyond the legend in `raywgen.weights`: R networks of a work item.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor, nn

from raywgen.generation.best import candidates_request, generate_best
from raywgen.generation.fill import TrainedGenerator
from raywgen.generation.plan import GenerationPlan, NetworkRow, WorkItem, WorkResult, fresh_module
from raywgen.generation.statistics import some_inputs
from raywgen.nn.memory import free_memory, gib
from raywgen.tasks import balanced_accuracy, build_task, stacked_logits
from raywgen.tasks.fitted_head import with_fitted_heads
from raywgen.tasks.linear_reference import left_out_accuracy
from raywgen.tasks.networks.text_adapter import has_fitted_head
from raywgen.tasks.standing import Standing, standing
from raywgen.weights import Layout, Normalizer

# Windows of smaller networks fit wherever a generator does.
_LARGE = 1 << 22
# Four copies of the values of a network that is generated whole are held at least.
_BYTES_PER_VALUE = 16


class NoMemoryError(ValueError):
    """There is not enough memory for a single window of large networks, or for all values of those generated whole."""


class Worker:
    """Does the work items of one plan by its generator."""

    def __init__(self, plan: GenerationPlan, trained: TrainedGenerator) -> None:
        self._plan = plan
        self._trained = trained
        self._fresh: tuple[int, nn.Module] | None = None
        self._normalizers: dict[int, Normalizer | None] = {}
        self._linear_by_task: dict[int, float] = {}

    @torch.no_grad()
    def run(self, item: WorkItem, kept: Mapping[str, Tensor] | None = None) -> WorkResult:
        """Generates the best of n for each network of an item, and scores it on test samples where there are any.

        Args:
            item: The work item. Of a piece the values are generated and nothing more.
            kept: The tensors that the items which it needs kept.

        Raises:
            SamplingError, GuidanceError, ShuffleError: The generator or the tasks do not fit `sampling`.
            NoMemoryError: A window of a large network does not fit into memory.
        """
        plan, request = self._plan, self._plan.request
        network = request.networks[item.network]
        self._check_memory(item)
        number_R = torch.arange(item.start, item.stop)
        task_R, draw_R = number_R // plan.num, number_R % plan.num
        normalizer = self._normalizer(item.network)
        condition = request.condition_for(network).take(task_R)
        # First one network of every task, so that asking for more of each keeps the noise of the first ones.
        keys = {"seed": plan.seed, "index_B": draw_R * len(request.task_ids) + task_R}
        kwargs = {"temperature": plan.temperature, "normalizer": normalizer, "sampling": plan.sampling, **keys}
        rows = [
            NetworkRow(
                task=request.task_ids[task],
                draw=draw,
                instruction=instruction,
                network=network.name,
                known=normalizer is None,
                log_prob=None,
            )
            for task, draw, instruction in zip(task_R.tolist(), draw_R.tolist(), condition.instructions, strict=True)
        ]
        generator = self._trained.generator
        arguments = generator, condition, network.layout
        if item.piece is not None:
            found = generator.generate_piece(candidates_request(*arguments, **kwargs), item.piece, kept or {}).cpu()
            return WorkResult(
                item=item, values_RD=found.values_BX, rows=_with_log_probs(rows, found.log_prob_B), kept=found.kept
            )
        if request.is_tried:
            module = self._module(item.network)
            unlabelled = [self._unlabelled(task) for task in task_R.tolist()] if plan.num_unlabelled else None
            best = generate_best(*arguments, module, best_of=request.best_of, unlabelled=unlabelled, **kwargs)
            linear = [None if has_fitted_head(network.recipe) else self._linear(task) for task in task_R.tolist()]
            judged = zip(best.logits_BSC, condition.labels_BS, linear, strict=True)
            found = [standing(logits, labels, request.best_of, one) for logits, labels, one in judged]
            rows = [_with_scores(*row) for row in zip(rows, found, best.loss_B.tolist(), strict=True)]
            accuracies = self._test_accuracies(best.values_BD, task_R, network.layout, module)
            rows = [replace(row, test_accuracy=accuracy) for row, accuracy in zip(rows, accuracies, strict=True)]
            values_RD, log_prob_R = best.values_BD, best.log_prob_B
        else:
            generated = generator.generate(candidates_request(*arguments, **kwargs)).cpu()
            values_RD, log_prob_R = generated.values_BD, generated.log_prob_B
            if has_fitted_head(network.recipe):
                known = condition.samples_BSF, condition.labels_BS
                values_RD, _ = with_fitted_heads(self._module(item.network), network.layout, values_RD, *known)
        return WorkResult(item=item, values_RD=values_RD, rows=_with_log_probs(rows, log_prob_R))

    def _check_memory(self, item: WorkItem) -> None:
        network, generator = self._plan.request.networks[item.network], self._trained.generator
        if network.layout.num_values <= _LARGE:
            return
        num = item.num_networks * self._plan.request.best_of
        needed, _ = generator.bytes_at_once(network.layout, self._plan.sampling, num)
        free = free_memory(generator.device)
        part, way_out = "a single window", ""
        if item.piece is None:
            needed += _BYTES_PER_VALUE * num * network.layout.num_values
            part, way_out = "all values", ", generate large networks in pieces by try_on_samples=false and into=files"
        if needed > free:
            raise NoMemoryError(
                f"{network.name}: {part} of {num} networks at once take about {gib(needed)} of memory, and {gib(free)} "
                f"are free; generate fewer at once by batch_size{way_out}, end other programs, or train a generator "
                "that sees shorter windows"
            )

    def _normalizer(self, index: int) -> Normalizer | None:
        """Returns the estimated normaliser of an unknown layout; None for one that the generator was trained on."""
        if index not in self._normalizers:
            layout, generator = self._plan.request.networks[index].layout, self._trained.generator
            if generator.knows(layout):
                self._normalizers[index] = None
            elif any(normalizer.start_D is not None for _, normalizer in generator.normalizers.values()):
                self._normalizers[index] = self._trained.estimate_normalizer(layout, self._module(index))
            else:
                # A network's own values count only where networks share their start.
                nothing_D = torch.empty(layout.num_values, device="meta")
                self._normalizers[index] = generator.estimate_normalizer(layout, nothing_D)
        return self._normalizers[index]

    def _module(self, index: int) -> nn.Module:
        if self._fresh is None or self._fresh[0] != index:
            self._fresh = index, fresh_module(self._plan.request.networks[index], self._plan.seed)
        return self._fresh[1]

    def _linear(self, task: int) -> float:
        """Returns what a linear classifier of a task's samples reaches, measured once for all its networks."""
        if task not in self._linear_by_task:
            condition = self._plan.request.condition
            self._linear_by_task[task] = left_out_accuracy(condition.samples_BSF[task], condition.labels_BS[task])
        return self._linear_by_task[task]

    def _unlabelled(self, index: int) -> Tensor:
        """Returns inputs of a task; for one of the user's own those of the labelled samples."""
        task = self._plan.request.tasks[index]
        if not task.recipe:
            return task.samples_SF
        return some_inputs(build_task(task.recipe), self._plan.num_unlabelled, self._plan.seed)

    @torch.no_grad()
    def _test_accuracies(
        self, values_RD: Tensor, task_R: Tensor, layout: Layout, module: nn.Module
    ) -> Iterator[float | None]:
        """Yields the balanced test accuracy of each network, or None; tasks are in order, so one is built at a time."""
        indices = task_R.tolist()
        for index, rows in groupby(range(len(indices)), key=indices.__getitem__):
            recipe = self._plan.request.tasks[index].recipe
            if not recipe:
                yield from (None for _ in rows)
                continue
            task = build_task(recipe)
            test_x_SF = task.test_x_SF
            for row in rows:
                logits = stacked_logits(module, layout.unflatten(values_RD[row : row + 1]), test_x_SF)
                yield float(balanced_accuracy(logits, task.test_y_S))


def _with_log_probs(rows: list[NetworkRow], log_prob_R: Tensor | None) -> list[NetworkRow]:
    if log_prob_R is None:
        return rows
    return [replace(row, log_prob=value) for row, value in zip(rows, log_prob_R.tolist(), strict=True)]


def _with_scores(row: NetworkRow, found: Standing, loss: float) -> NetworkRow:
    return replace(
        row,
        example_loss=loss,
        example_accuracy=found.accuracy,
        chance=found.chance,
        majority=found.majority,
        linear=found.linear,
        against_chance=found.verdict,
    )
