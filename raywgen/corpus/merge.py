"""Joins corpora into one; conflicts are found before anything is written."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence

import pyarrow as pa

from raywgen.corpus.corpus import Corpus
from raywgen.corpus.derive import OnCheckpoint, Selection, new_root, replace_columns, write_corpus
from raywgen.corpus.errors import CorpusError, UnknownFactError
from raywgen.corpus.fact_types import as_text as to_text
from raywgen.corpus.fact_types import one_type_each
from raywgen.corpus.facts import CHECKPOINT_SCHEMA, FactValue

_IDS = ("checkpoint_id", "trajectory_id", "base_id")


def merge(
    root: str, corpora: Sequence[Corpus], on_progress: OnCheckpoint | None = None, *, as_text: Collection[str] = ()
) -> Corpus:
    """Joins all checkpoints of all corpora; if ids clash, those of the later corpus are prefixed with its number.

    Args:
        root: Path or URI of the new corpus.
        corpora: The corpora to join.
        on_progress: Called with the number of checkpoints written and their total.
        as_text: Facts of the user's own to convert to text, because corpora differ in their type.

    Raises:
        CorpusError: A fact is a number in one corpus and text in another, two corpora mean different tasks by one id
            or build one layout in different ways, or `write_corpus` raises it.
        UnknownFactError: No corpus has a fact of `as_text`.
    """
    root = new_root(root)
    tables = _of_one_type(corpora, as_text)
    _check_tasks(corpora)
    _check_recipes(corpora)
    seen: set[str] = set()
    parts = []
    for number, (corpus, facts) in enumerate(zip(corpora, tables, strict=True)):
        ids = facts.column("checkpoint_id").to_pylist()
        renamed = {"checkpoint_id": ids}
        if seen & set(ids):
            # Trajectories and bases are named alike: if checkpoint ids clash, theirs clash too.
            free = (n for n in itertools.count(number) if not seen & {f"{n}/{name}" for name in ids})
            prefix = next(free)
            renamed = {name: _numbered(prefix, facts.column(name).to_pylist()) for name in _IDS}
        seen.update(name for name in renamed["checkpoint_id"] if name is not None)
        parts.append(Selection(corpus=corpus, facts=replace_columns(facts, stored_id=facts, **renamed)))
    return write_corpus(root, parts, {"merge": len(parts)}, on_progress)


def _numbered(number: int, names: list[str | None]) -> list[str | None]:
    return [None if name is None else f"{number}/{name}" for name in names]


def _of_one_type(corpora: Sequence[Corpus], as_text: Collection[str]) -> list[pa.Table]:
    """Returns the facts of all corpora, in which each column has one type."""
    known = {name for corpus in corpora for name in corpus.facts.column_names}
    if strange := [name for name in as_text if name not in known]:
        raise UnknownFactError(f"no corpus has a fact '{strange[0]}'; see `raywgen corpus info`")
    if fixed := [name for name in as_text if name in CHECKPOINT_SCHEMA.names]:
        raise CorpusError(f"fact '{fixed[0]}' has a type of its own; only facts of yours can become text")
    tables = [_with_text(corpus.facts, as_text) for corpus in corpora]
    one_type_each(
        (corpus.location, {name: _example(table, name) for name in table.column_names if not _is_known(name)})
        for corpus, table in zip(corpora, tables, strict=True)
    )
    for name in sorted(known - {*CHECKPOINT_SCHEMA.names} - set(as_text)):
        columns = [table.column(name) for table in tables if name in table.column_names]
        if len({column.type for column in columns}) > 1:
            _check_floats(name, corpora, tables)
    return tables


def _is_known(name: str) -> bool:
    return name in CHECKPOINT_SCHEMA.names


def _with_text(facts: pa.Table, names: Collection[str]) -> pa.Table:
    for name in set(names) & set(facts.column_names):
        cells = [None if cell is None else to_text(cell) for cell in facts.column(name).to_pylist()]
        facts = facts.set_column(facts.column_names.index(name), name, pa.array(cells, pa.string()))
    return facts


def _example(facts: pa.Table, name: str) -> FactValue:
    """Returns a value of a column, all of which have one type."""
    column = facts.column(name).drop_null()
    return column[0].as_py() if len(column) else None


def _check_floats(name: str, corpora: Sequence[Corpus], tables: Sequence[pa.Table]) -> None:
    for corpus, table in zip(corpora, tables, strict=True):
        try:
            if name in table.column_names:
                table.column(name).cast(pa.float64())
        except pa.ArrowException as error:
            raise CorpusError(
                f"fact '{name}' of {corpus.location} holds whole numbers too large for the fractions of another "
                f"corpus ({error}); take it as text by `--as-text {name}`"
            ) from error


def _check_tasks(corpora: Sequence[Corpus]) -> None:
    """Refuses ids that mean different tasks: checkpoints of both corpora would be assigned to the first."""
    first: dict[str, Corpus] = {}
    for corpus in corpora:
        for task_id, task in corpus.tasks.items():
            other = first.setdefault(task_id, corpus)
            if other.tasks[task_id].recipe != task.recipe:
                raise CorpusError(
                    f"{other.location} and {corpus.location} mean different tasks by '{task_id}' "
                    f"({other.tasks[task_id].recipe} and {task.recipe}); give one of them another `task_id`"
                )


def _check_recipes(corpora: Sequence[Corpus]) -> None:
    """Refuses corpora that build a layout in different ways, because a corpus holds one recipe for it."""
    first: dict[str, Corpus] = {}
    for corpus in corpora:
        for layout_id, network in corpus.networks.items():
            if not network.recipe:
                continue
            other = first.setdefault(layout_id, corpus)
            known = other.networks[layout_id]
            if known.recipe != network.recipe:
                raise CorpusError(
                    f"{other.location} builds '{known.name}' by {known.recipe}, {corpus.location} builds "
                    f"'{network.name}' of the same tensors by {network.recipe}; keep them in corpora of their own, or "
                    "describe one again by `raywgen corpus describe`"
                )
