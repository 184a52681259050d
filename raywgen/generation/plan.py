"""What is asked for, cut into blocks that any process can write.

A network's noise is keyed by its place among all that are asked for, and what is written at once is decided by the
plan alone: so a block is the same to the last bit whoever writes it, by as many threads, and in whatever order.

Shape legend: T tasks, R networks of a block, D values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from raywgen.corpus import NetworkFacts
from raywgen.generation.best import generate_best, generate_candidates
from raywgen.generation.fill import TrainedGenerator
from raywgen.generation.request import NO_TASK
from raywgen.generation.statistics import some_inputs
from raywgen.generators.igpg import SamplingConfig
from raywgen.tasks import balanced_accuracy, build_network, build_task, stacked_logits
from raywgen.tasks.standing import Standing, standing
from raywgen.weights import Condition, Layout, StateDict

# A GiB of float32: candidates of a large architecture are written by fewer at once.
_MOST_VALUES = 1 << 28


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """All that decides the networks.

    Attributes:
        generator: Run folder or bundle, as every process reaches it.
        networks: Architectures.
        names: T names of tasks; `NO_TASK` alone where none is known.
        condition: What the generator is told of each, T conditions.
        recipes: How to build each task, to test on it; empty for a task of the user's own.
        num: Networks kept for each task and architecture.
        best_of: Candidates of each.
        temperature: Of generation.
        seed: Of the noise, and of the values around which an unknown layout is filled.
        sampling: How tokens are drawn.
        threads: Of a process that writes, and CPUs of an actor.
        num_unlabelled: Training samples of a task from which statistics of batch normalisation are estimated anew; 0
            leaves them as they were written.
        is_tried: Whether networks are run on samples of their task; else each is the first that is written.
        trust: What recipes may name in a process that writes, as `trusting` takes it.
        kept: By layout id, the tensors that no generator writes, of architectures that nobody can build.
    """

    generator: str
    networks: list[NetworkFacts]
    names: list[str]
    condition: Condition
    recipes: list[dict[str, Any]]
    num: int
    best_of: int
    temperature: float
    seed: int
    sampling: SamplingConfig
    threads: int
    num_unlabelled: int = 0
    is_tried: bool = True
    trust: tuple[str, ...] = ()
    kept: dict[str, StateDict] = field(default_factory=dict)

    def condition_of(self, network: NetworkFacts) -> Condition:
        """What the generator is told; where no task is known the network's name for an instruction, as in training."""
        if self.names != [NO_TASK]:
            return self.condition
        return replace(self.condition, instructions=(network.name,))


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Networks that are written at once, counted task after task.

    Attributes:
        index: Of the block.
        network: Which of the job's architectures.
        start: First of them.
        stop: First that is none of them.
    """

    index: int
    network: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """The kept networks of a block.

    Attributes:
        block: Which.
        values_RD: Flat vectors.
        rows: Facts of each: `task`, `draw`, `instruction`, `network`, `known`, `log_prob`; where it was tried
            `example_loss`, `example_accuracy`, `chance`, `majority` and `against_chance` as `Standing` has them, and
            `test_accuracy` where the task has a test.
    """

    block: Block
    values_RD: Tensor
    rows: list[dict[str, Any]]


def plan_blocks(job: Job, most: int) -> list[Block]:
    """Blocks of at most that many candidates, but at least one network, nearly equally large."""
    total = len(job.names) * job.num
    blocks: list[Block] = []
    for number, network in enumerate(job.networks):
        candidates = min(most, _MOST_VALUES // max(1, network.layout.num_values))
        num = -(-total // max(1, candidates // job.best_of))
        for part in range(num):
            start, stop = part * total // num, (part + 1) * total // num
            blocks.append(Block(index=len(blocks), network=number, start=start, stop=stop))
    return blocks


def blank_network(network: NetworkFacts, seed: int) -> nn.Module:
    """A module to run weights through; an unknown layout is filled around its values.

    An empty one where nothing says how to build it.
    """
    if not network.recipe:
        return nn.Module()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_network(network.recipe).eval()


@contextmanager
def threads(num: int) -> Iterator[None]:
    """Torch with so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(num)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class BlockWriter:
    """Writes and scores blocks of one job by its generator."""

    def __init__(self, job: Job, trained: TrainedGenerator) -> None:
        self._job = job
        self._trained = trained
        self._blank: tuple[int, nn.Module] | None = None

    def write(self, block: Block) -> Written:
        """Best of n for each network of a block, and its accuracy on test samples, where they can be tried.

        Raises:
            SamplingError, GuidanceError, MismatchError: The generator or the tasks do not fit `sampling`.
        """
        job, layout = self._job, self._job.networks[block.network].layout
        if self._blank is None or self._blank[0] != block.network:
            self._blank = block.network, blank_network(job.networks[block.network], job.seed)
        module = self._blank[1]
        place_R = torch.arange(block.start, block.stop)
        task_R, draw_R = place_R // job.num, place_R % job.num
        normalizer = self._trained.estimate_normalizer(layout, module)
        told = job.condition_of(job.networks[block.network])
        # First one network of every task, so that asking for more of each keeps the noise of the first ones.
        keyed = {"seed": job.seed, "index_B": draw_R * len(job.names) + task_R}
        drawn = {"temperature": job.temperature, "normalizer": normalizer, "sampling": job.sampling}
        what = self._trained.generator, told.take(task_R), layout
        tried: list[dict[str, Any]] = [{}] * len(place_R)
        if job.is_tried:
            unlabelled = [self._unlabelled(task) for task in task_R.tolist()] if job.num_unlabelled else None
            kept = generate_best(*what, module, best_of=job.best_of, unlabelled=unlabelled, **keyed, **drawn)
            tried = [
                _judged(standing(logits_SC, labels_S, job.best_of), float(loss))
                for logits_SC, labels_S, loss in zip(kept.logits_BSC, what[1].labels_BS, kept.loss_B, strict=True)
            ]
        else:
            kept = generate_candidates(*what, **keyed, **drawn)
        rows = [
            {
                "task": job.names[task],
                "draw": draw,
                "instruction": told.instructions[task],
                "network": job.networks[block.network].name,
                "known": normalizer is None,
                **tried[index],
                "log_prob": None if kept.log_prob_B is None else float(kept.log_prob_B[index]),
            }
            for index, (task, draw) in enumerate(zip(task_R.tolist(), draw_R.tolist(), strict=True))
        ]
        if job.recipes and job.is_tried:
            for row, accuracy in zip(rows, self._accuracies(kept.values_BD, task_R, layout, module), strict=True):
                row["test_accuracy"] = accuracy
        return Written(block=block, values_RD=kept.values_BD, rows=rows)

    def _unlabelled(self, task: int) -> Tensor:
        """Inputs of a task; of one of the user's own those of the labelled samples."""
        job = self._job
        if not job.recipes:
            return job.condition.samples_BSF[task]
        return some_inputs(build_task(job.recipes[task]), job.num_unlabelled, job.seed)

    @torch.no_grad()
    def _accuracies(self, values_RD: Tensor, task_R: Tensor, layout: Layout, module: nn.Module) -> Iterator[float]:
        """Balanced test accuracy of each network; tasks follow one another, so one at a time is there."""
        numbers = task_R.tolist()
        for number, rows in groupby(range(len(numbers)), key=numbers.__getitem__):
            task = build_task(self._job.recipes[number])
            test_x_SF = task.test_x_SF
            for row in rows:
                logits = stacked_logits(module, layout.unflatten(values_RD[row : row + 1]), test_x_SF)
                yield float(balanced_accuracy(logits, task.test_y_S))


def _judged(found: Standing, loss: float) -> dict[str, Any]:
    return {
        "example_loss": loss,
        "example_accuracy": found.accuracy,
        "chance": found.chance,
        "majority": found.majority,
        "against_chance": found.verdict,
    }
