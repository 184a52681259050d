"""Writes a corpus whose networks have their hidden units in the order of a reference.

Networks from different starts learn similar features in different orders, so the same position in two of them has no
common meaning. Weight matching (`raywgen.weights.alignment`) reorders each trajectory by its last checkpoint; the
function of a network does not change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn

from raywgen.corpus.corpus import Corpus
from raywgen.corpus.derive import OnCheckpoint, Selection, new_root, write_corpus
from raywgen.corpus.errors import CorpusError
from raywgen.corpus.facts import FactValue
from raywgen.trust import entry_point
from raywgen.weights import Layout, LayoutMismatchError, StateDict
from raywgen.weights.alignment import match_weights
from raywgen.weights.symmetry import Symmetry, check_symmetry, find_symmetry

Build = Callable[[Mapping[str, object]], nn.Module]
"""Builds a network from its recipe, as `raywgen.tasks.build_network` does."""
_BATCH_VALUES = 1 << 24
_TRIED_SAMPLES = 2
_OWN = "own"
_COLUMNS = {
    "aligned_to": pa.string(),
    "aligned_by": pa.string(),
    "unaligned_distance": pa.float64(),
    "aligned_distance": pa.float64(),
    "moved_units": pa.int64(),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Aligned:
    """The order that a trajectory is brought to.

    Attributes:
        reference: Id of the checkpoint that it is aligned to.
        chosen_by: Id of its last checkpoint, whose weights were matched.
        orders: Permutations, as `Symmetry.permute` takes them.
        distance: Distance of that checkpoint to the reference before, divided by the norm of the reference.
        matched: The same distance afterwards.
    """

    reference: str
    chosen_by: str
    orders: list[Tensor]
    distance: float
    matched: float

    def facts(self) -> dict[str, FactValue]:
        """Returns the facts that every checkpoint of the trajectory gets."""
        moved = sum(int((order_U != torch.arange(len(order_U))).sum()) for order_U in self.orders)
        return dict(zip(_COLUMNS, (self.reference, self.chosen_by, self.distance, self.matched, moved), strict=True))


Key = tuple[str, str]
"""Layout id and trajectory id."""


@dataclass(kw_only=True)
class AlignConfig:
    """Settings of an alignment.

    Attributes:
        references: Checkpoint ids, at most one per architecture; by default the last checkpoint of the first training
            trajectory of each.
        network: Recipe of the corpus's networks, if the corpus has none.
        input_shape: Shape of one input, without the batch; by default that of the corpus's task samples.
        seed: Seed of the order in which groups of units are visited.
    """

    references: list[str] = field(default_factory=list)
    network: dict[str, Any] = field(default_factory=dict)
    input_shape: list[int] = field(default_factory=list)
    seed: int = 0


@entry_point
def align(
    root: str,
    corpus: Corpus,
    build: Build,
    config: AlignConfig | None = None,
    on_match: OnCheckpoint | None = None,
    on_progress: OnCheckpoint | None = None,
) -> Corpus:
    """Writes a corpus in which every network's hidden units are in the order that lies closest to a reference.

    Each checkpoint gets these facts: `aligned_to` (the reference), `aligned_by` (the last checkpoint of its
    trajectory, whose weights were matched), `unaligned_distance` and `aligned_distance` (of that checkpoint to the
    reference, divided by its norm, without running statistics), and `moved_units`.

    Args:
        root: Path or URI of the new corpus.
        corpus: Networks from different starts.
        build: Builds a module from a recipe.
        config: References, recipe, inputs.
        on_match: Called with the number of trajectories matched and their total.
        on_progress: Called with the number of checkpoints written and their total.

    Raises:
        CorpusError: Networks share a start, a reference is missing or superfluous, a network cannot be built or has
            nothing to reorder, or `write_corpus` raises it.
        SymmetryError: A network cannot be traced.
    """
    config = config or AlignConfig()
    root = new_root(root)
    _check_starts(corpus)
    chosen = _references(corpus, config.references)
    symmetries = {layout_id: _symmetry(corpus, reference, build, config) for layout_id, reference in chosen.items()}
    ends = _ends(corpus)
    aligned: dict[Key, Aligned] = {}
    for layout_id, reference in chosen.items():
        for group in _batches(corpus, ends[layout_id]):
            aligned |= _match(corpus, symmetries[layout_id], group, reference, config.seed)
            if on_match is not None:
                on_match(len(aligned), sum(table.num_rows for table in ends.values()))

    def change(group: pa.Table, packed_NP: Tensor) -> Tensor:
        form = corpus.form(group.column("shard")[0].as_py())
        network, symmetry = corpus.layout(form.id), symmetries[form.id]
        orders = [aligned[key].orders for key in _keys(group)]
        states = (_renamed(form.unpack(packed_P), form, network) for packed_P in packed_NP)
        moved = (symmetry.permute(state, order) for state, order in zip(states, orders, strict=True))
        return torch.stack([form.pack(_renamed(state, network, form)) for state in moved])

    part = Selection(corpus=corpus, facts=_with_alignment(corpus.facts, aligned), change=change)
    return write_corpus(root, [part], {"align": list(chosen.values()), "seed": config.seed}, on_progress)


def summary(aligned: Corpus) -> list[tuple[str, int, float, float]]:
    """Returns for each reference its id, the number of trajectories aligned to it, and their mean distances."""
    ends = pa.concat_tables(_ends(aligned).values())
    names = ("aligned_to", "unaligned_distance", "aligned_distance")
    rows = list(zip(*(ends.column(name).to_pylist() for name in names), strict=True))
    summaries = []
    for reference in dict.fromkeys(row[0] for row in rows):
        # The distance of the reference's own trajectory says nothing.
        own = aligned.select(checkpoint_id=reference).column("trajectory_id")[0].as_py()
        found = [
            row[1:]
            for row, trajectory in zip(rows, ends.column("trajectory_id").to_pylist(), strict=True)
            if row[0] == reference and trajectory != own
        ]
        before, after = (sum(column) / len(found) for column in zip(*found, strict=True)) if found else (0.0, 0.0)
        summaries.append((reference, len(found), before, after))
    return summaries


def _check_starts(corpus: Corpus) -> None:
    facts = corpus.facts
    if "optimizer" in facts.column("split").to_pylist():
        raise CorpusError(
            f"{corpus.location} keeps optimiser tensors, which alignment would leave behind; take them out first: "
            f"`raywgen corpus filter {corpus.location} OUT split!=optimizer`"
        )
    rows = zip(*(facts.column(name).to_pylist() for name in ("start", "base_id", "split")), strict=True)
    shared = sum(
        start in ("shared", "branched", "meta") or base is not None or split == "base" for start, base, split in rows
    )
    if shared:
        raise CorpusError(
            f"{corpus.location}: {shared} of {facts.num_rows} checkpoints have a start in common (shared, branched or "
            "a base checkpoint): their hidden units are in one order already, and reordering would separate them "
            f"from their base. Align the others only: `raywgen corpus filter {corpus.location} OUT start={_OWN}`"
        )


def _ends(corpus: Corpus) -> dict[str, pa.Table]:
    """Returns the facts of the last checkpoint of every trajectory, by layout, training trajectories first."""
    steps = corpus.facts.column("step").to_pylist()
    splits = corpus.facts.column("split").to_pylist()
    last: dict[Key, int] = {}
    for index, key in enumerate(_keys(corpus.facts)):
        if key not in last or steps[index] > steps[last[key]]:
            last[key] = index
    rows: dict[str, list[int]] = {}
    for (layout_id, _), index in last.items():
        rows.setdefault(layout_id, []).append(index)
    return {
        layout_id: corpus.facts.take(sorted(found, key=lambda index: splits[index] != "train"))
        for layout_id, found in rows.items()
    }


def _references(corpus: Corpus, wanted: Sequence[str]) -> dict[str, str]:
    """Returns the reference of each layout, by layout id."""
    chosen: dict[str, str] = {}
    for name in wanted:
        facts = corpus.select(checkpoint_id=name)
        if facts.num_rows != 1:
            known = ", ".join(f"'{table.column('checkpoint_id')[0]}'" for table in _ends(corpus).values())
            raise CorpusError(
                f"{corpus.location} holds no checkpoint '{name}' to align to; give one, for instance {known}"
            )
        layout_id = facts.column("layout_id")[0].as_py()
        if layout_id in chosen:
            raise CorpusError(
                f"'{chosen[layout_id]}' and '{name}' are of one architecture ({corpus.networks[layout_id].name}); "
                "give one reference for each"
            )
        chosen[layout_id] = name
    firsts = {layout_id: table.column("checkpoint_id")[0].as_py() for layout_id, table in _ends(corpus).items()}
    return firsts | chosen


def _symmetry(corpus: Corpus, reference: str, build: Build, config: AlignConfig) -> Symmetry:
    """Finds the symmetry of the reference's module and checks it with its weights on samples."""
    known = corpus.networks[corpus.select(checkpoint_id=reference).column("layout_id")[0].as_py()]
    if config.network and len(set(corpus.facts.column("layout_id").to_pylist())) > 1:
        raise CorpusError(
            f"{corpus.location} holds several architectures, one recipe is given; align them apart: "
            f"`raywgen corpus filter {corpus.location} OUT architecture={known.name}`"
        )
    recipe = config.network or known.recipe
    if not recipe:
        raise CorpusError(
            f"{corpus.location} does not know how to build '{known.name}'; give its recipe, for instance "
            "--network '{name: cifar-resnet, depth: 20}' or --network '{name: package.module:Class}'"
        )
    module = build(recipe)
    own = module.state_dict()
    state = {name: tensor for name, tensor in own.items() if not tensor.is_floating_point()}
    for name, tensor in _state(corpus, reference).items():
        state[name] = tensor.to(own[name].dtype) if name in own else tensor
    try:
        Layout.from_state_dict(own).check(state, f"'{known.name}'")
    except LayoutMismatchError as error:
        raise CorpusError(
            f"recipe {dict(recipe)} builds another network than {corpus.location} holds: {error}; give its own recipe"
        ) from error
    module.load_state_dict(state)
    inputs = _inputs(corpus, config.input_shape)
    symmetry = find_symmetry(module, inputs)
    if not symmetry.groups:
        blocked = f" ({', '.join(symmetry.blocked_by)} cannot be followed)" if symmetry.blocked_by else ""
        raise CorpusError(f"'{known.name}' has no hidden units that may change places{blocked}; it needs no alignment")
    check_symmetry(module, symmetry, inputs)
    return symmetry


def _inputs(corpus: Corpus, input_shape: Sequence[int]) -> Tensor:
    """Draws noise of the shape that networks take, `(S, F)` or `(S, *input_shape)`."""
    if not input_shape:
        if not corpus.tasks:
            raise CorpusError(
                f"{corpus.location} has no tasks to show what its networks take; give the shape of one input, "
                "for instance --input-shape 3,32,32"
            )
        input_shape = next(iter(corpus.tasks.values())).samples_SF.shape[1:]
    return torch.randn(_TRIED_SAMPLES, *input_shape, generator=torch.Generator().manual_seed(0))


def _batches(corpus: Corpus, ends: pa.Table) -> Iterator[pa.Table]:
    size = max(1, _BATCH_VALUES // max(1, corpus.layout(ends.column("layout_id")[0].as_py()).num_values))
    for _, of_form, _ in corpus.by_form(ends):
        for start in range(0, of_form.num_rows, size):
            yield of_form.slice(start, size)


def _renamed(state: StateDict, form: Layout, other: Layout) -> StateDict:
    """Renames the tensors of a network to the names of another form."""
    names = form.names_in(other)
    return {names.get(name, name): tensor for name, tensor in state.items()}


def _state(corpus: Corpus, checkpoint_id: str) -> StateDict:
    """Reads a checkpoint under the tensor names of its network."""
    form = corpus.form(corpus.select(checkpoint_id=checkpoint_id).column("shard")[0].as_py())
    return _renamed(corpus.state_dict(checkpoint_id), form, corpus.layout(form.id))


def _match(corpus: Corpus, symmetry: Symmetry, ends: pa.Table, reference: str, seed: int) -> dict[Key, Aligned]:
    form = corpus.form(ends.column("shard")[0].as_py())
    states = _renamed(form.unpack(corpus.packed(ends)), form, corpus.layout(form.id))
    found = match_weights(symmetry, _state(corpus, reference), states, seed)
    ids = ends.column("checkpoint_id").to_pylist()
    return {
        key: Aligned(
            reference=reference,
            chosen_by=ids[index],
            orders=found.of(index),
            distance=float(found.distance_N[index]),
            matched=float(found.matched_N[index]),
        )
        for index, key in enumerate(_keys(ends))
    }


def _keys(facts: pa.Table) -> list[Key]:
    columns = (facts.column(name).to_pylist() for name in ("layout_id", "trajectory_id"))
    return list(zip(*columns, strict=True))


def _with_alignment(facts: pa.Table, aligned: Mapping[Key, Aligned]) -> pa.Table:
    """Adds the facts of the alignment; those of an earlier one are replaced."""
    rows = [aligned[key].facts() for key in _keys(facts)]
    facts = facts.drop_columns([name for name in _COLUMNS if name in facts.column_names])
    for name, kind in _COLUMNS.items():
        facts = facts.append_column(name, pa.array([row[name] for row in rows], kind))
    return facts
