"""Queries over facts: `architecture=resnet20 test_accuracy>0.9 checkpoint_id~runs/*`."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute

from raywgen.corpus.errors import CorpusError, UnknownFactError
from raywgen.names import nearest

# Arrow creates these functions at import, so no type checker sees them.
pc: Any = pyarrow.compute

_TERM = re.compile(r'^("(?:[^"]|"")+"|[^"=<>!~][^=<>!~]*?)(\s*)(>=|<=|!=|=|>|<|~)(.*)$', re.DOTALL)
_VALUES = re.compile(r'("(?:[^"]|"")*"|[^,]*)(?:,|$)', re.DOTALL)
_PIECES = re.compile(r"\*+|\[!?\]?[^\]]*\]|.", re.DOTALL)
_NOTHING = r"[^\x00-\x{10FFFF}]"
_COMPARE = {"=": "equal", "!=": "not_equal", ">": "greater", "<": "less", ">=": "greater_equal", "<=": "less_equal"}


def check_fact(facts: pa.Table, name: str) -> None:
    """Refuses the name of a fact that checkpoints do not have.

    Raises:
        UnknownFactError: There is no such fact; the message names the nearest.
    """
    if name not in facts.column_names:
        near = nearest(name, facts.column_names)
        raise UnknownFactError(f"unknown fact '{name}'; did you mean '{near}'?")


def select_facts(facts: pa.Table, equals: Mapping[str, Any]) -> pa.Table:
    """Returns the rows of facts with these values; a list or tuple means any of its values.

    Raises:
        UnknownFactError: There is no such fact; the message names the nearest.
    """
    mask = None
    for name, wanted in equals.items():
        check_fact(facts, name)
        column = facts.column(name)
        values = wanted if isinstance(wanted, list | tuple) else [wanted]
        hit = pc.is_in(column, value_set=pa.array(values, column.type))
        mask = hit if mask is None else pc.and_(mask, hit)
    return facts if mask is None else facts.filter(mask)


def filter_facts(facts: pa.Table, terms: Sequence[str]) -> pa.Table:
    """Returns the rows that satisfy all terms.

    Args:
        facts: The facts, one row a checkpoint.
        terms: `FACT OP VALUE`; OP is `=`, `!=`, `>`, `<`, `>=`, `<=` or `~` (a pattern with `*`). For `=`, several
            values may be joined by commas. A fact's name may hold spaces and signs (`eval/acc>0.9`, `val acc>0.9`);
            where it holds one of `=<>!~`, and where a value holds a comma, it stands in double quotes:
            `"p(y=1)">0.5`, `group="a,b"`. Text that consists of numbers is compared as numbers by `>` and `<`.

    Raises:
        CorpusError: A term is not a query, or its value does not fit the fact's type.
        UnknownFactError: Checkpoints have no such fact; the message names the nearest.
    """
    mask = None
    for term in terms:
        hit = _hits(facts, term)
        mask = hit if mask is None else pc.and_(mask, hit)
    return facts if mask is None else facts.filter(mask)


def _hits(facts: pa.Table, term: str) -> pa.ChunkedArray:
    match = _TERM.match(term)
    if match is None:
        raise CorpusError(
            f"'{term}' is no query; write for instance architecture=resnet20 or test_accuracy>0.9, and names with any "
            'of =<>!~ in double quotes: "p(y=1)">0.5'
        )
    name, space, operator, text = match.groups()
    name = _unquoted(name)
    check_fact(facts, name)
    if space:
        text = text.strip()
    column = facts.column(name)
    if operator == "~":
        if not pa.types.is_string(column.type):
            raise CorpusError(f"'{term}': {name} is a number; compare it by =, >, < instead of ~")
        return pc.match_substring_regex(column, f"^{_regex(text)}$")
    if operator == "=":
        values = [_value(part, column.type, term) for part in _parts(text)]
        return pc.is_in(column, value_set=pa.array(values, column.type))
    text = _unquoted(text)
    if operator != "!=" and pa.types.is_string(column.type) and _number(text) is not None:
        column = _as_numbers(column, term)
    return pc.fill_null(getattr(pc, _COMPARE[operator])(column, _value(text, column.type, term)), False)


def _unquoted(text: str) -> str:
    is_quoted = len(text) > 1 and text[0] == text[-1] == '"'
    return text[1:-1].replace('""', '"') if is_quoted else text


def _parts(text: str) -> list[str]:
    """Splits values that are joined by commas."""
    parts = []
    place = 0
    while match := _VALUES.match(text, place):
        parts.append(_unquoted(match[1]))
        place = match.end()
        if not match[0].endswith(","):
            break
    return parts


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _as_numbers(column: pa.ChunkedArray, term: str) -> pa.Array:
    """Converts text that consists of numbers, because 10 would come before 9 in alphabetical order."""
    cells = column.to_pylist()
    numbers = [None if cell is None else _number(cell) for cell in cells]
    lost = next(
        (cell for cell, number in zip(cells, numbers, strict=True) if cell is not None and number is None), None
    )
    if lost is not None:
        raise CorpusError(f"'{term}': this fact is text, such as {lost!r}; compare it by = or ~, or with a text")
    return pa.array(numbers, pa.float64())


def _value(text: str, kind: pa.DataType, term: str) -> pa.Scalar:
    try:
        return pa.scalar(text).cast(kind)
    except pa.ArrowException as error:
        raise CorpusError(f"'{term}': {text!r} is no {kind}; give a value of that type") from error


def _regex(pattern: str) -> str:
    """Translates a shell pattern for Arrow's RE2, which has no `\\Z`, no lookahead and no atomic group."""
    # Piece by piece: between two stars `fnmatch.translate` writes an atomic group, for an empty range a lookahead.
    parts = [fnmatch.translate(piece).removeprefix("(?s:").rpartition(")")[0] for piece in _PIECES.findall(pattern)]
    return "(?s:" + "".join(_NOTHING if part == "(?!)" else part for part in parts) + ")"
