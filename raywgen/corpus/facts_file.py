"""A user's table of facts, joined to checkpoints by path pattern."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from raywgen.corpus.errors import CorpusError
from raywgen.corpus.facts import CHECKPOINT_COLUMNS, CheckpointFacts

_TYPES = {field.name: str(field.type) for field in dataclasses.fields(CheckpointFacts)}
_OURS = ("checkpoint_id", "layout_id", "key_prefix", "dtype", "sha256", "num_values", "shard", "row", "stored_id")


class FactsFile:
    """Rows with a `path` pattern and facts; an empty file where there is none.

    Args:
        path: CSV, JSON (a list of objects) or Parquet. Column `path` holds a name or a pattern such as
            `resnet20/*`; every other column is a fact. Later rows win.

    Raises:
        CorpusError: It cannot be read, has no column `path`, or names a fact that only raywgen sets.
    """

    def __init__(self, path: str) -> None:
        rows = _read(path) if path else []
        for row in rows:
            if "path" not in row:
                raise CorpusError(
                    f"{path}: a row has no column 'path'; name the checkpoints it is about, for instance resnet20/*"
                )
            if taken := sorted(set(row) & set(_OURS)):
                raise CorpusError(f"{path}: column '{taken[0]}' is set by raywgen itself; rename or drop it")
        self._exact: dict[str, dict[str, Any]] = {}
        self._patterns: list[tuple[str, dict[str, Any]]] = []
        self._name = path
        for row in rows:
            where = str(row["path"])
            told = {key: value for key, value in row.items() if key != "path" and value is not None}
            if _is_pattern(where):
                self._patterns.append((where, told))
            else:
                self._exact[where] = self._exact.get(where, {}) | told

    def of(self, name: str, file: str) -> dict[str, Any]:
        """The facts of a checkpoint by its name or file, converted to the types of known facts."""
        facts: dict[str, Any] = {}
        for pattern, told in self._patterns:
            if fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(file, pattern):
                facts |= told
        facts |= self._exact.get(file, {}) | self._exact.get(Path(file).name, {}) | self._exact.get(name, {})
        return {key: self._convert(key, value) for key, value in facts.items()}

    def _convert(self, key: str, value: Any) -> Any:
        try:
            return convert(key, value)
        except (TypeError, ValueError) as error:
            raise CorpusError(f"{self._name}: {key}={value!r} is no {_TYPES[key]}; correct it") from error


def convert(key: str, value: Any) -> Any:
    """A fact in the type that raywgen knows for it; others stay as they are, or become text (dates, lists)."""
    kind = _TYPES.get(key, "") if key in CHECKPOINT_COLUMNS else ""
    if kind == "int":
        if isinstance(value, float) and not value.is_integer():
            raise ValueError(f"{value} is no whole number")
        return int(value)
    if kind == "float":
        return float(value)
    return value if not kind and isinstance(value, bool | int | float) else str(value)


def _is_pattern(text: str) -> bool:
    return any(sign in text for sign in "*?[")


def _read(path: str) -> list[dict[str, Any]]:
    try:
        if path.endswith(".json"):
            rows = json.loads(Path(path).read_text())
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise CorpusError(f'{path} holds no list of objects; give [{{"path": ..., ...}}, ...]')
            return rows
        if path.endswith(".parquet"):
            return pyarrow.parquet.ParquetFile(path).read(use_threads=False).to_pylist()
        # An empty cell says nothing, also where the column is text.
        options = pyarrow.csv.ConvertOptions(strings_can_be_null=True, null_values=[""])
        return pyarrow.csv.read_csv(path, convert_options=options).to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:
        if isinstance(error, CorpusError):
            raise
        raise CorpusError(
            f"facts={path} cannot be read ({error}); give CSV, JSON or Parquet with a column 'path'"
        ) from error
