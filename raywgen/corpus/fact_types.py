"""The types that facts may have: numbers, true or false, and text.

Facts that raywgen knows (`CheckpointFacts`) have a fixed type. A fact of the user's own has one type for all
checkpoints of a corpus, because it becomes a column of a table.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from raywgen.corpus.errors import CorpusError
from raywgen.corpus.facts import CHECKPOINT_COLUMNS, CheckpointFacts, FactValue

KNOWN_TYPES = {field.name: str(field.type) for field in dataclasses.fields(CheckpointFacts) if field.name != "more"}
_LARGEST_EXACT_FLOAT = 2**53


def convert(name: str, value: Any) -> FactValue:
    """Converts a known fact to its type; a fact of the user's own keeps its type, or becomes text.

    Raises:
        TypeError, ValueError: The value does not have the type of a known fact.
    """
    kind = KNOWN_TYPES.get(name, "")
    if kind == "int":
        return _whole_number(value)
    if kind == "float":
        if isinstance(value, bool):
            raise ValueError(f"{value} is no number")
        return float(value)
    if not kind and isinstance(value, bool | float):
        return value
    if not kind and isinstance(value, int) and -(2**63) <= value < 2**63:
        return value
    return as_text(value)


def _whole_number(value: Any) -> int:
    if isinstance(value, str):
        # Tables with gaps write whole numbers as `3.0`.
        value = int(value) if value.strip().lstrip("+-").isdigit() else float(value)
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError(f"{value} is no whole number")
    if not -(2**63) <= int(value) < 2**63:
        raise ValueError(f"{value} does not fit into 64 bits")
    return int(value)


def as_text(value: object) -> str:
    """Converts a fact to text: numbers and nested values are written as JSON, dates by ISO 8601."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float | list | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def kind_of_fact(value: FactValue) -> str:
    """Returns `text`, `number` or `true or false`; values of one column must be of one kind."""
    if isinstance(value, bool):
        return "true or false"
    return "number" if isinstance(value, int | float) else "text"


def numbers_of_text(cells: Sequence[str]) -> list[int | float] | None:
    """Converts the cells of a text table to numbers if that loses nothing; else returns None.

    Every number must reproduce its cell when it is written, so `007`, `1e5`, `0.10` and whole numbers beyond 64 bits
    stay text. `nan` and `NaN` are allowed beside numbers.
    """
    numbers: list[int | float] = []
    for cell in cells:
        number = _exact_number(cell)
        if number is None:
            return None
        numbers.append(number)
    if all(isinstance(number, int) for number in numbers):
        return numbers
    is_exact = all(isinstance(number, float) or abs(number) <= _LARGEST_EXACT_FLOAT for number in numbers)
    return [float(number) for number in numbers] if is_exact and any(map(math.isfinite, numbers)) else None


def _exact_number(cell: str) -> int | float | None:
    try:
        whole = int(cell)
        if str(whole) == cell and -(2**63) <= whole < 2**63:
            return whole
    except ValueError:
        pass
    try:
        number = float(cell)
    except ValueError:
        return None
    return number if repr(number) == cell or cell in ("nan", "NaN") else None


def one_type_each(
    rows: Iterable[tuple[str, dict[str, FactValue]]], cast_to_text: Collection[str] = ()
) -> list[dict[str, FactValue]]:
    """Checks that each fact has one type, after converting some to text.

    Args:
        rows: The origin (for the message) and the facts of each checkpoint.
        cast_to_text: Facts to convert to text.

    Raises:
        CorpusError: A fact is a number in one place and text in another; both are named, and the remedy.
    """
    seen: dict[str, tuple[str, str, FactValue]] = {}
    result = []
    for where, facts in rows:
        facts = {name: as_text(value) if name in cast_to_text else value for name, value in facts.items()}
        for name, value in facts.items():
            if name in CHECKPOINT_COLUMNS or value is None:
                continue
            kind = kind_of_fact(value)
            first = seen.setdefault(name, (kind, where, value))
            if first[0] != kind:
                raise CorpusError(
                    f"fact '{name}' is {first[0]} in {first[1]} ({first[2]!r}) and {kind} in {where} ({value!r}); "
                    f"a fact has one type: take it as text everywhere by `--as-text {_shell(name)}`, or correct one"
                )
        result.append(facts)
    return result


def _shell(name: str) -> str:
    return f"'{name}'" if any(not (sign.isalnum() or sign in "_-./") for sign in name) else name
