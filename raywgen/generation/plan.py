"""Cuts the networks of a request into work items that any process can do.

The noise of a network is keyed by its number among all networks, and the plan alone decides which networks
are generated at once. So the result of an item is the same to the last bit whoever does it, by as many threads, and in
whatever order.

Shape letters beyond the legend in `raywgen.weights`: R networks of a work item.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from raywgen.corpus import NetworkFacts
from raywgen.generation.config import GenerateConfig
from raywgen.generation.request import ResolvedRequest
from raywgen.generators import Generator, Sampling
from raywgen.generators.pieces import Piece
from raywgen.locations import absolute
from raywgen.tasks import build_network
from raywgen.weights import Layout, StateDict

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
        piece: The piece of these networks that the item is; None for all of their values.
        needs: Indices of the items whose `kept` tensors this one reads.
    """

    index: int
    network: int
    start: int
    stop: int
    piece: Piece | None = None
    needs: tuple[int, ...] = ()

    @property
    def num_networks(self) -> int:
        """Number of networks in the item, R."""
        return self.stop - self.start

    @property
    def networks(self) -> tuple[int, int, int]:
        """The architecture and the networks: all items with the same ones are pieces of them."""
        return self.network, self.start, self.stop


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
        example_loss: Loss on the labelled samples of the task; None, like the next four, where it was not tried.
        example_accuracy: Balanced accuracy on them.
        chance: Balanced accuracy of guessing.
        majority: Share of the most frequent class.
        linear: Balanced accuracy of a linear classifier on each of them, fitted to the others; None, too, for networks
            whose own head is fitted to them.
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
    linear: float | None = None
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
        values_RD: Flat vectors, or the values of the item's piece.
        rows: Facts of each network; for a piece its share of the log-probability.
        kept: Tensors that other pieces read.
    """

    item: WorkItem
    values_RD: Tensor
    rows: list[NetworkRow]
    kept: Mapping[str, Tensor] = field(default_factory=dict)


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

    @property
    def has_pieces(self) -> bool:
        """Whether a network is generated in pieces."""
        return any(item.piece is not None for item in self.items)

    def num_values(self, item: WorkItem) -> int:
        """Returns the number of values that an item writes, of all of its networks."""
        layout = self.request.networks[item.network].layout
        return item.num_networks * (layout.num_values if item.piece is None else item.piece.num_values)

    @property
    def num_bytes(self) -> int:
        """Bytes of all values that are written."""
        total = 0
        for item in self.items:
            layout = self.request.networks[item.network].layout
            whole = sum(spec.num_bytes for spec in layout.generated)
            total += self.num_values(item) * whole // layout.num_values
        return total


PiecesOf = Callable[[Layout, int], list[Piece]]
"""Returns the pieces of a number of networks of a layout that are generated at once."""


def make_plan(
    config: GenerateConfig, request: ResolvedRequest, sampling: Sampling, generator: Generator
) -> GenerationPlan:
    """Cuts a request into work items: pieces of large networks, where these are kept as files and not tried."""

    def pieces_of(layout: Layout, num: int) -> list[Piece]:
        if layout.num_values <= config.piece_values or config.into != "files" or request.is_tried:
            return []
        return generator.pieces(layout, sampling, num, max(1, config.piece_values // num))

    return GenerationPlan(
        request=request,
        generator=absolute(config.generator),
        num=config.num,
        temperature=config.temperature,
        seed=config.seed,
        sampling=sampling,
        threads=config.threads,
        num_unlabelled=config.num_unlabelled,
        items=work_items(request, config.num, config.batch_size, pieces_of),
    )


def work_items(
    request: ResolvedRequest, num: int, batch_size: int, pieces_of: PiecesOf | None = None
) -> tuple[WorkItem, ...]:
    """Returns items of nearly equal size, of at most `batch_size` candidates, but at least one network."""
    total = len(request.task_ids) * num
    items: list[WorkItem] = []
    for number, network in enumerate(request.networks):
        candidates = min(batch_size, _MOST_VALUES // max(1, network.layout.num_values))
        num_items = -(-total // max(1, candidates // request.best_of))
        for part in range(num_items):
            start, stop = part * total // num_items, (part + 1) * total // num_items
            pieces = [] if pieces_of is None else pieces_of(network.layout, stop - start)
            if len(pieces) < 2:
                items.append(WorkItem(index=len(items), network=number, start=start, stop=stop))
                continue
            first = len(items)
            items += [
                WorkItem(
                    index=first + piece.index,
                    network=number,
                    start=start,
                    stop=stop,
                    piece=piece,
                    needs=tuple(first + index for index in piece.needs),
                )
                for piece in pieces
            ]
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


def kept_state(network: NetworkFacts, seed: int, stored: StateDict) -> StateDict:
    """Returns the tensors of a network that no generator writes: from a fresh network, or from a stored one.

    Args:
        network: The architecture.
        seed: Seed of the fresh network.
        stored: Such tensors of a stored network, which serve where nothing says how to build one.
    """
    specs = [spec for spec in network.layout.tensors if not spec.is_generated and not spec.tied_to]
    if network.recipe and all(spec.name.rpartition(".")[2] == "num_batches_tracked" for spec in specs):
        # A large network need not be built for counters that are zero.
        return {spec.name: torch.zeros(spec.shape, dtype=spec.torch_dtype) for spec in specs}
    whole = stored | fresh_module(network, seed).state_dict()
    return {spec.name: whole[spec.name].clone() for spec in specs if spec.name in whole}
