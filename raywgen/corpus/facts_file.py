"""Reads a user's table of facts: CSV, TSV, JSON, JSON lines or Parquet with a column `path`."""

from __future__ import annotations

import codecs
import csv
import io
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from raywgen.corpus.errors import CorpusError
from raywgen.corpus.fact_types import KNOWN_TYPES, convert, numbers_of_text
from raywgen.corpus.facts import CONFIG_FILES, FILE_METADATA, FactValue
from raywgen.inputs import check_regular, parse_json, read_regular
from raywgen.parquet import bounded_table

_PATH = "path"
_MAX_BYTES = 1 << 30
_SET_BY_RAYWGEN = (
    "checkpoint_id",
    "layout_id",
    "key_prefix",
    "dtype",
    "sha256",
    "xxh3",
    "xxh3_pages",
    "num_values",
    "shard",
    "row",
    "stored_id",
    FILE_METADATA,
    CONFIG_FILES,
)
_SEPARATORS = {".csv": ",;\t", ".tsv": "\t", ".tab": "\t"}
_NUMBERS = {"int": "whole number", "float": "number with a decimal point"}
_KINDS = ".csv, .tsv, .json, .jsonl or .parquet"


@dataclass(frozen=True, slots=True)
class FactsRow:
    """One row of a table of facts.

    Attributes:
        number: Row number as in a spreadsheet: the header of a CSV is row 1. In JSON the first object is row 1.
        path: Name or pattern of the checkpoints that the row is about; empty if it names none.
        facts: Facts by name, in their final types, without those that the row leaves empty.
    """

    number: int
    path: str
    facts: dict[str, FactValue]


def read_facts(path: str) -> list[FactsRow]:
    """Reads the rows of a table of facts.

    Args:
        path: CSV (also with `;` or tabs), TSV, JSON (a list of objects), JSON lines or Parquet. In CSV and TSV text
            stays text: a column becomes numbers only where writing them gives back every cell.

    Raises:
        CorpusError: The file cannot be read, has no column `path`, has a column twice or without a name, or has a
            column that only raywgen sets.
    """
    kind = Path(path).suffix.lower()
    try:
        if kind in _SEPARATORS:
            return _text_table(path, _decoded(path), _SEPARATORS[kind])
        if kind == ".parquet":
            return _parquet(path)
        if kind in (".json", ".jsonl", ".ndjson"):
            return _json(path, _decoded(path), lines=kind != ".json")
        raise CorpusError(f"facts={path} is of no known kind; give {_KINDS} with a column 'path'")
    except (OSError, ValueError, RecursionError, pa.ArrowException) as error:
        if isinstance(error, CorpusError):
            raise
        raise CorpusError(f"facts={path} cannot be read ({error}); give {_KINDS} with a column 'path'") from error


def _decoded(path: str) -> str:
    content = read_regular(path, _MAX_BYTES)
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise CorpusError(
            f"facts={path} is not UTF-8 (line {line}); save it as UTF-8, so that no name is altered"
        ) from error


def _text_table(path: str, text: str, separators: str) -> list[FactsRow]:
    if not text.strip():
        raise CorpusError(f"facts={path} is empty; give {_KINDS} with a column 'path'")
    # In some countries spreadsheets separate cells by `;`, which the header shows.
    headers = {sign: next(csv.reader(io.StringIO(text, newline=""), delimiter=sign)) for sign in separators}
    found = (sign for sign, cells in headers.items() if _PATH in (cell.strip() for cell in cells))
    separator = next(found, separators[0])
    raw = headers[separator]
    names = [name.strip() for name in raw]
    _check_columns(path, names)
    table = pyarrow.csv.read_csv(
        pa.BufferReader(text.encode()),
        read_options=pyarrow.csv.ReadOptions(use_threads=False),
        parse_options=pyarrow.csv.ParseOptions(delimiter=separator, newlines_in_values=True),
        # An empty cell means unknown, `""` is an empty text.
        convert_options=pyarrow.csv.ConvertOptions(
            column_types={name: pa.string() for name in raw},
            strings_can_be_null=True,
            null_values=[""],
            quoted_strings_can_be_null=False,
        ),
    )
    columns = {name: table.column(index).to_pylist() for index, name in enumerate(names)}
    for name, cells in columns.items():
        if name != _PATH and name not in KNOWN_TYPES:
            numbers = numbers_of_text([cell for cell in cells if cell is not None])
            if numbers is not None:
                values = iter(numbers)
                columns[name] = [None if cell is None else next(values) for cell in cells]
    rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    return [_row(path, number, row) for number, row in enumerate(rows, 2)]


def _parquet(path: str) -> list[FactsRow]:
    check_regular(path)
    with pa.memory_map(path) as source:
        table = bounded_table(source, path)
    _check_columns(path, table.column_names)
    return [_row(path, number, row) for number, row in enumerate(table.to_pylist(), 1)]


def _json(path: str, text: str, *, lines: bool) -> list[FactsRow]:
    if lines:
        numbered = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        content: list[tuple[int, object]] = [(number, _json_line(path, number, line)) for number, line in numbered]
    else:
        whole = parse_json(text, lambda pairs: _object(path, pairs))
        content = list(enumerate(whole, 1)) if isinstance(whole, list) else [(1, None)]
    rows = [(number, row) for number, row in content if isinstance(row, dict)]
    if len(rows) < len(content):
        raise CorpusError(
            f'{path} holds no list of objects; give [{{"path": ..., ...}}, ...], or one object a line in a .jsonl'
        )
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    if rows and (lost := [number for number, row in rows if _PATH not in row]):
        raise CorpusError(_no_path(f"{path}, row {lost[0]}", list(dict(rows)[lost[0]])))
    if rows:
        _check_columns(path, names)
    # pandas writes a missing text as NaN.
    texts = {name for _, row in rows for name, value in row.items() if isinstance(value, str)}
    return [
        _row(path, number, {name: value for name, value in row.items() if not (name in texts and _is_nan(value))})
        for number, row in rows
    ]


def _json_line(path: str, number: int, line: str) -> object:
    try:
        return parse_json(line, lambda pairs: _object(path, pairs))
    except json.JSONDecodeError as error:
        raise CorpusError(f"{path}, line {number} is no JSON ({error}); give one object a line") from error


def _object(path: str, pairs: list[tuple[str, object]]) -> dict[str, object]:
    counts = Counter(name for name, _ in pairs)
    if doubled := [name for name, count in counts.items() if count > 1]:
        raise CorpusError(f"{path}: an object names '{doubled[0]}' twice; keep one")
    return dict(pairs)


def _check_columns(path: str, names: list[str]) -> None:
    counts = Counter(names)
    if doubled := [name for name in names if counts[name] > 1]:
        raise CorpusError(f"{path}: column '{doubled[0]}' is there twice; rename or drop one of them")
    if "" in counts:
        raise CorpusError(
            f"{path}: column {names.index('') + 1} has no name; give it one or drop it (pandas: to_csv(index=False))"
        )
    if _PATH not in counts:
        raise CorpusError(_no_path(path, names))
    if taken := sorted(set(names) & set(_SET_BY_RAYWGEN)):
        raise CorpusError(f"{path}: column '{taken[0]}' is set by raywgen itself; rename or drop it")


def _no_path(where: str, names: list[str]) -> str:
    known = ", ".join(names[:8]) or "none"
    return f"{where} has no column 'path' (it has {known}); name by it the checkpoints, for instance resnet20/*"


def _row(path: str, number: int, row: Mapping[str, object]) -> FactsRow:
    facts: dict[str, FactValue] = {}
    for name, value in row.items():
        if name == _PATH or value is None or (KNOWN_TYPES.get(name, "").startswith("str") and _is_nan(value)):
            continue
        if isinstance(value, bytes):
            raise CorpusError(f"{path}, row {number}: {name} holds bytes; write text or numbers")
        try:
            facts[name] = convert(name, value)
        except (TypeError, ValueError, OverflowError) as error:
            raise CorpusError(
                f"{path}, row {number}: {name}={value!r} is no {_NUMBERS[KNOWN_TYPES[name]]}; correct it, or leave it "
                "empty where it is not known"
            ) from error
    where = row.get(_PATH)
    return FactsRow(number, "" if where is None else str(where), facts)


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)
