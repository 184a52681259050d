"""Queries over facts: `architecture=resnet20 test_accuracy>0.9 checkpoint_id~runs/*`."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute

from raywgen.corpus.errors import CorpusError, UnknownFactError

# Arrow makes these functions when it is imported, where no type checker sees them.
pc: Any = pyarrow.compute

_TERM = re.compile(r"^(\w+)(>=|<=|!=|=|>|<|~)(.*)$", re.DOTALL)
_PIECES = re.compile(r"\*+|\[!?\]?[^\]]*\]|.", re.DOTALL)
_NOTHING = r"[^\x00-\x{10FFFF}]"
_COMPARE = {"=": "equal", "!=": "not_equal", ">": "greater", "<": "less", ">=": "greater_equal", "<=": "less_equal"}


def filter_facts(facts: pa.Table, terms: Sequence[str]) -> pa.Table:
    """The rows that satisfy all terms.

    Args:
        facts: One row a checkpoint.
        terms: `FACT OP VALUE` without spaces; OP is `=`, `!=`, `>`, `<`, `>=`, `<=` or `~` (a pattern with `*`). For
            `=`, several values may be joined by commas.

    Raises:
        CorpusError: A term is no query, or its value does not fit the fact's type.
        UnknownFactError: Checkpoints have no such fact; the nearest is named.
    """
    mask = None
    for term in terms:
        hit = _hits(facts, term)
        mask = hit if mask is None else pc.and_(mask, hit)
    return facts if mask is None else facts.filter(mask)


def _hits(facts: pa.Table, term: str) -> pa.ChunkedArray:
    match = _TERM.match(term)
    if match is None:
        raise CorpusError(f"'{term}' is no query; write for instance architecture=resnet20 or test_accuracy>0.9")
    name, operator, text = match.groups()
    if name not in facts.column_names:
        near = difflib.get_close_matches(name, facts.column_names, n=1, cutoff=0.0)[0]
        raise UnknownFactError(f"unknown fact '{name}'; did you mean '{near}'?")
    column = facts.column(name)
    if operator == "~":
        if not pa.types.is_string(column.type):
            raise CorpusError(f"'{term}': {name} is a number; compare it by =, >, < instead of ~")
        return pc.match_substring_regex(column, f"^{_regex(text)}$")
    if operator == "=":
        values = [_value(part, column.type, term) for part in text.split(",")]
        return pc.is_in(column, value_set=pa.array(values, column.type))
    return pc.fill_null(getattr(pc, _COMPARE[operator])(column, _value(text, column.type, term)), False)


def _value(text: str, kind: pa.DataType, term: str) -> pa.Scalar:
    try:
        return pa.scalar(text).cast(kind)
    except pa.ArrowException as error:
        raise CorpusError(f"'{term}': {text!r} is no {kind}; give a value of that type") from error


def _regex(pattern: str) -> str:
    """Of a shell pattern, for Arrow's RE2, which knows no `\\Z`, no lookahead and no atomic group."""
    # Piece by piece: between two stars `fnmatch.translate` writes an atomic group, for an empty range a lookahead.
    parts = [fnmatch.translate(piece).removeprefix("(?s:").rpartition(")")[0] for piece in _PIECES.findall(pattern)]
    return "(?s:" + "".join(_NOTHING if part == "(?!)" else part for part in parts) + ")"
