"""Cuts the networks of a request into work items that any process can do.

The noise of a network is keyed by its number among all networks, and the plan alone decides which networks
are generated at once. So the result of an item is the same to the last bit whoever does it, by as many threads, and in
whatever order.

Shape letters beyond the legend in `raywgen.weights`: R networks of a work item.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raywgen.corpus import NetworkFacts
from raywgen.generation.config import GenerateConfig
from raywgen.generation.request import ResolvedRequest
from raywgen.generators import Sampling
from raywgen.locations import absolute
from raywgen.tasks import build_network

# A GiB of float32: fewer candidates of a large architecture are generated at once.
_MOST_VALUES = 1 << 28
_OPTIONAL = ("path", "checkpoint_id", "against_chance")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkItem:
    """Networks of one architecture that are generated at once, counted task after task.

    Attributes:
        index: Number of the item in its plan.
        network: Index of the architecture in the request.
        start: First network.
        stop: End index, exclusive.
    """

    index: int
    network: int
    start: int
    stop: int

    @property
    def num_networks(self) -> int:
        """Number of networks in the item, R."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkRow:
    """The facts of a generated network.

    Attributes:
        task: Task id; empty where no task is known.
        draw: Number of the network among those for the same task and architecture.
        instruction: The task in words, as the generator was given it.
        network: Name of the architecture.
        known: Whether the generator was trained on the architecture.
        log_prob: Log-probability under the generator, nats; None where the method has no density.
        example_loss: Loss on the labelled samples of the task; None, like the next three, where it was not tried.
        example_accuracy: Balanced accuracy on them.
        chance: Balanced accuracy of guessing.
        majority: Share of the most frequent class.
        against_chance: Comparison with chance, as in `Standing.verdict`; empty where it was not tried.
        test_accuracy: Balanced accuracy on the task's test samples; None where there are none.
        path: The file that holds the network, where it is kept in one.
        checkpoint_id: Its id, where it is kept in a corpus.
    """

    task: str
    draw: int
    instruction: str
    network: str
    known: bool
    log_prob: float | None
    example_loss: float | None = None
    example_accuracy: float | None = None
    chance: float | None = None
    majority: float | None = None
    against_chance: str = ""
    test_accuracy: float | None = None
    path: str = ""
    checkpoint_id: str = ""

    def to_json(self) -> dict[str, Any]:
        """Returns what is known of the network, without what is not."""
        return {
            name: value
            for name, value in asdict(self).items()
            if name == "log_prob" or not (value is None or (name in _OPTIONAL and not value))
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkResult:
    """The networks of a work item.

    Attributes:
        item: The work item.
        values_RD: Flat vectors.
        rows: Facts of each network.
    """

    item: WorkItem
    values_RD: Tensor
    rows: list[NetworkRow]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationPlan:
    """Everything that decides the networks, and the work items that they are generated in.

    Attributes:
        request: Architectures and tasks.
        generator: Run folder or bundle, as every process reaches it.
        num: Networks kept for each task and architecture.
        temperature: Temperature of generation.
        seed: Keys the noise, and the values around which an unknown layout is filled.
        sampling: Settings of sampling.
        threads: Threads of a process that generates, and CPUs of an actor.
        num_unlabelled: Training samples of a task from which statistics of batch normalisation are estimated anew; 0
            leaves them as they were generated.
        items: The work items, architecture after architecture.
    """

    request: ResolvedRequest
    generator: str
    num: int
    temperature: float
    seed: int
    sampling: Sampling
    threads: int
    num_unlabelled: int
    items: tuple[WorkItem, ...]


def make_plan(config: GenerateConfig, request: ResolvedRequest, sampling: Sampling) -> GenerationPlan:
    """Cuts a request into work items."""
    return GenerationPlan(
        request=request,
        generator=absolute(config.generator),
        num=config.num,
        temperature=config.temperature,
        seed=config.seed,
        sampling=sampling,
        threads=config.threads,
        num_unlabelled=config.num_unlabelled,
        items=work_items(request, config.num, config.batch_size),
    )


def work_items(request: ResolvedRequest, num: int, batch_size: int) -> tuple[WorkItem, ...]:
    """Returns items of nearly equal size, of at most `batch_size` candidates, but at least one network."""
    total = len(request.task_ids) * num
    items: list[WorkItem] = []
    for number, network in enumerate(request.networks):
        candidates = min(batch_size, _MOST_VALUES // max(1, network.layout.num_values))
        num_items = -(-total // max(1, candidates // request.best_of))
        for part in range(num_items):
            start, stop = part * total // num_items, (part + 1) * total // num_items
            items.append(WorkItem(index=len(items), network=number, start=start, stop=stop))
    return tuple(items)


def fresh_module(network: NetworkFacts, seed: int) -> nn.Module:
    """Builds a module to run weights through; an unknown layout is filled around its values.

    The module is empty where nothing says how to build the network.
    """
    if not network.recipe:
        return nn.Module()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_network(network.recipe).eval()
