"""The facts about checkpoints, tasks and networks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from raywgen.corpus.errors import CorpusError
from raywgen.json_types import JsonObject
from raywgen.weights import Layout

FactValue = str | int | float | bool | None
"""A fact as a table holds it; None if it is unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFacts:
    """The facts about one checkpoint.

    Attributes:
        checkpoint_id: Unique in the corpus.
        trajectory_id: The optimisation run that it belongs to.
        task_id: The task that it was trained for; None for a start.
        layout_id: Id of its layout.
        step: Optimiser step, or the number in its file name; -1 if unknown.
        split: `train` (a training trajectory of a seen task), `heldout` (a held-out trajectory of a seen task),
            `validation`, `unseen` (any trajectory of such a task) or `base` (a shared start).
        start: `own`, `shared`, `branched` or `meta`.
        base_id: Checkpoint of the start, where networks share it.
        start_seed: Seed of the start.
        order_seed: Seed of the data order.
        optimizer: Name of the optimiser.
        learning_rate: Learning rate of the optimiser.
        train_loss: Training loss at this step or at the trajectory's end; NaN if unknown.
        test_accuracy: Balanced accuracy in [0, 1]; NaN if unknown.
        source: The file or corpus that it comes from.
        licence: SPDX identifier.
        architecture: Name of the network.
        key_prefix: The prefix that a wrapper had put before every tensor's name.
        more: Further facts of the user's own, strings or numbers by name; `FILE_METADATA` and `CONFIG_FILES` hold what
            came with the file.
    """

    checkpoint_id: str
    trajectory_id: str
    task_id: str | None
    layout_id: str
    step: int
    split: str
    start: str
    base_id: str | None
    start_seed: int
    order_seed: int
    optimizer: str
    learning_rate: float
    train_loss: float
    test_accuracy: float
    source: str
    licence: str
    architecture: str = ""
    key_prefix: str = ""
    more: dict[str, FactValue] = dataclasses.field(default_factory=dict)

    def to_row(self) -> dict[str, FactValue]:
        """Returns the row of the table of facts; further facts are columns of their own."""
        return {**self.more, **dict(zip(CHECKPOINT_COLUMNS, _known_facts(self), strict=True))}


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFacts:
    """The facts about one task.

    Attributes:
        task_id: Unique in the corpus.
        instruction: The question in words.
        split: `seen`, `validation` or `unseen`.
        recipe: Recipe from which the task can be built.
        samples_SF: Labelled training samples for conditioning, float32.
        labels_S: Labels of these samples, int64.
    """

    task_id: str
    instruction: str
    split: str
    recipe: dict[str, Any]
    samples_SF: Tensor
    labels_S: Tensor

    def __repr__(self) -> str:
        return f"TaskFacts({self.task_id!r}, {self.split}, {self.instruction!r}, {len(self.labels_S)} labelled samples)"


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkFacts:
    """One architecture: its name, its recipe for `build_network`, and its layout."""

    name: str
    recipe: dict[str, Any]
    layout: Layout

    def to_json(self) -> JsonObject:
        """Returns the JSON object of the manifest."""
        layout = self.layout
        return {"name": self.name, "recipe": self.recipe, "layout": layout.to_json(), "form_id": layout.form_id}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> NetworkFacts:
        """Reads what `to_json` wrote.

        Raises:
            KeyError: The layout is not the one that was written.
        """
        layout = Layout.from_json(row["layout"])
        if row.get("form_id", layout.form_id) != layout.form_id:
            raise KeyError(f"the layout of {row['name']}")
        return cls(name=row["name"], recipe=row["recipe"], layout=layout)


FILE_METADATA = "file_metadata"
"""The fact that holds the metadata of a safetensors file, as JSON."""
CONFIG_FILES = "config_files"
"""The fact that holds the texts of a model folder's configs by file name, as JSON."""
CONFIG_NAMES = ("config.json", "generation_config.json", "adapter_config.json")
_INTEGERS = {"step", "start_seed", "order_seed", "num_values", "row"}
_FLOATS = {"learning_rate", "train_loss", "test_accuracy"}
CHECKPOINT_COLUMNS = [field.name for field in dataclasses.fields(CheckpointFacts) if field.name != "more"]
_known_facts = attrgetter(*CHECKPOINT_COLUMNS)
CHECKPOINT_SCHEMA = pa.schema(
    [
        (name, pa.int64() if name in _INTEGERS else pa.float64() if name in _FLOATS else pa.string())
        for name in [*CHECKPOINT_COLUMNS, "dtype", "sha256", "xxh3", "num_values", "shard", "row"]
    ]
)
QUARANTINE_SCHEMA = pa.schema(
    [("checkpoint_id", pa.string()), ("file", pa.string()), ("reason", pa.string()), ("kind", pa.string())]
)
PAGES_SCHEMA = pa.schema([("checkpoint_id", pa.string()), ("xxh3", pa.binary())])
"""The checksums of the pages of every checkpoint that has several, 8 bytes a page."""
TASK_SCHEMA = pa.schema(
    [
        ("task_id", pa.string()),
        ("instruction", pa.string()),
        ("split", pa.string()),
        ("recipe", pa.string()),
        ("samples", pa.list_(pa.float32())),
        ("labels", pa.list_(pa.int64())),
    ]
)


def facts_table(rows: Sequence[Mapping[str, FactValue]]) -> pa.Table:
    """Makes a table of facts; further facts follow the known columns, null if a checkpoint has none.

    Raises:
        CorpusError: A further fact is text for one checkpoint and a number for another, or a number beside which
            64-bit floats are not exact.
    """
    known = set(CHECKPOINT_SCHEMA.names)
    table = pa.Table.from_pylist(
        [{name: row[name] for name in CHECKPOINT_SCHEMA.names} for row in rows], CHECKPOINT_SCHEMA
    )
    for name in sorted({name for row in rows for name in row} - known):
        try:
            column = pa.array([row.get(name) for row in rows])
        except pa.ArrowException as error:
            raise CorpusError(
                f"fact '{name}' is not of one type for all checkpoints ({error}); take it as text by "
                f"`raywgen corpus build --as-text {name}`"
            ) from error
        table = table.append_column(name, column)
    return table


def tasks_to_table(tasks: Sequence[TaskFacts]) -> pa.Table:
    """Makes a table with one row a task."""
    rows = [
        {
            "task_id": task.task_id,
            "instruction": task.instruction,
            "split": task.split,
            "recipe": json.dumps(task.recipe, sort_keys=True),
            "samples": task.samples_SF.flatten().numpy(),
            "labels": task.labels_S.numpy(),
        }
        for task in tasks
    ]
    return pa.Table.from_pylist(rows, schema=TASK_SCHEMA)


def tasks_from_table(table: pa.Table) -> dict[str, TaskFacts]:
    """Reads tasks, by id, from what `tasks_to_table` made."""
    return {task.task_id: task for task in map(_task, _rows(table))}


def _rows(table: pa.Table) -> Iterable[dict[str, pa.Scalar]]:
    arrays = {name: table.column(name) for name in table.column_names}
    for index in range(table.num_rows):
        yield {name: column[index] for name, column in arrays.items()}


def _task(row: Mapping[str, pa.Scalar]) -> TaskFacts:
    labels = np.array(row["labels"].values)
    samples = np.array(row["samples"].values)
    return TaskFacts(
        task_id=row["task_id"].as_py(),
        instruction=row["instruction"].as_py(),
        split=row["split"].as_py(),
        recipe=json.loads(row["recipe"].as_py()),
        samples_SF=torch.from_numpy(samples.reshape(len(labels), -1)),
        labels_S=torch.from_numpy(labels),
    )
