"""Labelled sentences, and the Parquet files that labelled data of any kind comes in.

A file is Hugging Face-style: a `label` column of integers, class names in the schema's metadata. A path is a local
one or a URI that `pyarrow.fs` takes, may hold `*`, `?` and `[...]`, or begins with `hf://`.
"""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pyarrow import fs
from torch import Tensor

from raywgen.extras import hub_needed
from raywgen.parquet import bounded_batches, open_parquet
from raywgen.storage import Storage
from raywgen.tasks.base import TaskError

_ALL = "all"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TextData:
    """Sentences with the class of each.

    Attributes:
        name: The name of the file without its ending.
        sentences: S sentences.
        labels: Class of each, int64 `(S,)`.
        split: Part of the data that each belongs to: `train`, `validation`, `test`, or `all` if the file has no parts.
        class_names: Name of each class.
        source: The path as it was given.
    """

    name: str
    sentences: tuple[str, ...]
    labels: Tensor
    split: tuple[str, ...]
    class_names: tuple[str, ...]
    source: str

    def sentences_at(self, rows_S: Tensor) -> tuple[str, ...]:
        """Returns some of the sentences, in this order."""
        return tuple(self.sentences[row] for row in rows_S.tolist())


def load_texts(path: str | os.PathLike[str], split: str | None = None) -> TextData:
    """Reads sentences from the columns `sentence`, `label` and, where there is one, `split`.

    Args:
        path: A Parquet file, a glob of several, or `hf://...`.
        split: Keeps the sentences of this part alone; None keeps all.

    Raises:
        TaskError: A file or column is missing, a value is missing, or no sentence is of that split.
    """
    tables = open_tables(path)
    sentences = [text for table in tables for text in table.strings("sentence")]
    labels_S = np.concatenate([table.labels() for table in tables])
    splits = [part for table in tables for part in table.strings("split", default=_ALL)]
    if split is not None:
        kept = [row for row, part in enumerate(splits) if part == split]
        if not kept:
            raise TaskError(f"{os.fspath(path)} has no split '{split}'; it has: {', '.join(sorted(set(splits)))}")
        sentences, splits = [sentences[row] for row in kept], [splits[row] for row in kept]
    else:
        kept = list(range(len(sentences)))
    return TextData(
        name=tables[0].name,
        sentences=tuple(sentences),
        labels=torch.from_numpy(labels_S[kept]),
        split=tuple(splits),
        class_names=class_names(tables, labels_S),
        source=os.fspath(path),
    )


def load_plain_texts(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Reads texts from the column `sentence`; other columns are not needed.

    Args:
        path: A Parquet file, a glob of several, or `hf://...`.

    Raises:
        TaskError: A file or the column is missing, or a value is no text.
    """
    return tuple(text for table in open_tables(path) for text in table.strings("sentence"))


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledTable:
    """One Parquet file with at least one row.

    Attributes:
        filesystem: The file system that it lies on.
        info: Path, size and modification time.
        schema: Columns and metadata.
        num_rows: Number of rows.
    """

    filesystem: fs.FileSystem
    info: fs.FileInfo
    schema: pa.Schema
    num_rows: int

    @property
    def name(self) -> str:
        """Returns the name of the file without its ending."""
        return PurePosixPath(self.info.path).stem

    @property
    def features(self) -> dict[str, dict[str, Any]]:
        """Reads what the hub's metadata says about columns; empty where there is none."""
        try:
            features = json.loads((self.schema.metadata or {})[b"huggingface"])["info"]["features"]
        except (KeyError, TypeError, ValueError):
            return {}
        return {str(name): entry for name, entry in features.items() if isinstance(entry, dict)}

    def column(self, wanted: str, feature: str = "") -> str:
        """Returns the column of that name, else the only one that the hub's metadata calls a `feature`.

        Raises:
            TaskError: There is none, or there are several.
        """
        if wanted in self.schema.names:
            return wanted
        others = [name for name, entry in self.features.items() if feature and entry.get("_type") == feature]
        if len(others) != 1 or others[0] not in self.schema.names:
            raise TaskError(
                f"{self.info.path} has no column '{wanted}' (it has: {', '.join(self.schema.names)}); rename one"
            )
        return others[0]

    def batches(self, columns: list[str], num_rows: int = 1 << 16) -> Iterator[pa.RecordBatch]:
        """Yields the rows in order, as batches of at most `num_rows`.

        Raises:
            TaskError: The file is damaged.
        """
        with _reading(self.info.path), self.filesystem.open_input_file(self.info.path) as file:
            yield from bounded_batches(file, self.info.path, columns, num_rows)

    def values(self, column: str) -> list[Any]:
        """Returns a whole column."""
        return [value for batch in self.batches([column]) for value in batch.column(0).to_pylist()]

    def strings(self, column: str, default: str | None = None) -> list[str]:
        """Returns a whole column of strings; without such a column, `default` for each row where one is given.

        Raises:
            TaskError: There is no such column and no default, or a value is no string.
        """
        if default is not None and column not in self.schema.names:
            return [default] * self.num_rows
        values = self.values(self.column(column))
        for row, value in enumerate(values):
            if not isinstance(value, str):
                raise TaskError(f"{self.info.path} row {row}: '{column}' is {value!r}; give a string or drop the row")
        return values

    def labels(self) -> np.ndarray:
        """Returns the class of each row, int64.

        Raises:
            TaskError: There is no such column, or a value is no class number.
        """
        column = self.column("label", "ClassLabel")
        if not pa.types.is_integer(self.schema.field(column).type):
            kind = self.schema.field(column).type
            raise TaskError(f"{self.info.path}: '{column}' is {kind}; number the classes from 0 and store int64")
        values = self.values(column)
        for row, value in enumerate(values):
            if value is None or value < 0:
                raise TaskError(f"{self.info.path} row {row}: '{column}' is {value}; drop unlabelled rows")
        return np.asarray(values, dtype=np.int64)


def class_names(tables: list[LabelledTable], labels_S: np.ndarray) -> tuple[str, ...]:
    """Returns class names from the first table's metadata, else the class numbers as text.

    Raises:
        TaskError: The tables name their classes differently, or a label lies beyond the names.
    """
    named = [(table, _stored_names(table)) for table in tables]
    first, names = named[0]
    for table, others in named[1:]:
        if others != names:
            raise TaskError(f"{table.info.path} and {first.info.path} name their classes differently; load them apart")
    highest = int(labels_S.max())
    if names and highest >= len(names):
        raise TaskError(f"{first.info.path}: label {highest} lies beyond the {len(names)} class names; mend either")
    return names or tuple(map(str, range(highest + 1)))


def _stored_names(table: LabelledTable) -> tuple[str, ...]:
    names = table.features.get(table.column("label", "ClassLabel"), {}).get("names")
    plain = (table.schema.metadata or {}).get(b"classes", b"").decode()
    return tuple(map(str, names)) if names else tuple(plain.split(",")) if plain else ()


def open_tables(path: str | os.PathLike[str]) -> list[LabelledTable]:
    """Opens a Parquet file or a glob of several, in the order of their paths.

    Raises:
        TaskError: There is no such file, or one is no Parquet file or has no rows.
    """
    filesystem, infos = find_files(path)
    tables = []
    for info in infos:
        if info.type == fs.FileType.Directory:
            raise TaskError(f"{info.path} is a folder; give a Parquet file or a glob such as {info.path}/*.parquet")
        with _reading(info.path), filesystem.open_input_file(info.path) as file:
            parquet = open_parquet(file, info.path)
            schema, num_rows = parquet.schema_arrow, parquet.metadata.num_rows
        if num_rows == 0:
            raise TaskError(f"{info.path} has no rows; write it again, or leave it out")
        tables.append(LabelledTable(filesystem=filesystem, info=info, schema=schema, num_rows=num_rows))
    return tables


def find_files(path: str | os.PathLike[str]) -> tuple[fs.FileSystem, list[fs.FileInfo]]:
    """Returns the file or folder at a path, or the matches of a glob in the order of their paths.

    Raises:
        TaskError: There is nothing, or the file system cannot be reached.
    """
    where = os.fspath(path)
    try:
        filesystem, inner = _filesystem(where)
        found = [filesystem.get_file_info(inner)]
        if found[0].type == fs.FileType.NotFound:
            found = _glob(filesystem, inner) if any(sign in inner for sign in "*?[") else []
    except TaskError:
        raise
    except Exception as error:  # The hub's client raises errors of several libraries.
        raise TaskError(
            f"{where} cannot be reached ({error}); check the name and the connection, or download the file and give "
            "its local path"
        ) from error
    if strange := [info.path for info in found if info.type == fs.FileType.Unknown]:
        raise TaskError(f"{strange[0]} is a pipe, socket or device; give a file or a folder")
    if not found:
        raise TaskError(f"{where}: there is no such file or folder; check the path")
    return filesystem, found


def _filesystem(where: str) -> tuple[fs.FileSystem, str]:
    if where.startswith("hf://"):
        try:
            from huggingface_hub import HfFileSystem  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise TaskError(
                f"{hub_needed(where, 'huggingface_hub')}, or download the file and give its local path"
            ) from error
        return fs.PyFileSystem(fs.FSSpecHandler(HfFileSystem())), where.removeprefix("hf://")
    if "://" in where:
        storage = Storage.at(where)
        return storage.filesystem, storage.root
    return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(where))


def _glob(filesystem: fs.FileSystem, pattern: str) -> list[fs.FileInfo]:
    """Expands a glob folder by folder, into matching ones alone: links elsewhere may lead round in circles."""
    first, *rest = PurePosixPath(pattern).parts
    found = [first]
    for part in rest[:-1]:
        found = [path for folder in found for path in _matching(filesystem, folder, part, fs.FileType.Directory)]
    files = [path for folder in found for path in _matching(filesystem, folder, rest[-1], fs.FileType.File)]
    return filesystem.get_file_info(sorted(files))


def _matching(filesystem: fs.FileSystem, folder: str, part: str, kind: fs.FileType) -> list[str]:
    """Returns paths of this kind in a folder whose names match one part of a pattern."""
    if not any(sign in part for sign in "*?["):
        path = str(PurePosixPath(folder) / part)
        return [path] if filesystem.get_file_info(path).type == kind else []
    selector = fs.FileSelector(folder, allow_not_found=True)
    listed = [info for info in filesystem.get_file_info(selector) if fnmatch.fnmatchcase(info.base_name, part)]
    return [info.path for info in listed if info.type == kind]


@contextmanager
def _reading(path: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, EOFError) as error:
        raise TaskError(f"{path} cannot be read as Parquet ({error}); write or download it again") from error
