from __future__ import annotations

import fnmatch
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raywgen.corpus import CorpusError, UnknownFactError
from raywgen.corpus.query import filter_facts
from tests.corpus import builders

COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
    ">=": operator.ge,
    "<=": operator.le,
}
TEXTS = st.text(alphabet="ab/-.*?[]!\n\\^$(é", max_size=6)
# 0.0 and -0.0 are one number for Python, two values for Arrow's sets.
FLOATS = st.floats(allow_nan=False, allow_infinity=False).map(lambda value: value + 0.0)
VALUES: dict[str, tuple[pa.DataType, st.SearchStrategy[Any]]] = {
    "text": (pa.string(), TEXTS),
    "whole": (pa.int64(), st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 3)),
    "real": (pa.float64(), FLOATS | st.sampled_from([0.0, 0.5, -1.0])),
}


def table(column: str, values: list[Any]) -> pa.Table:
    return pa.table({"index": list(range(len(values))), column: pa.array(values, VALUES[column][0])})


def matched(facts: pa.Table, *terms: str) -> list[int]:
    return filter_facts(facts, terms).column("index").to_pylist()


@settings(max_examples=150)
@given(data=st.data(), column=st.sampled_from(sorted(VALUES)), sign=st.sampled_from(sorted(COMPARE)))
def test_comparisons_agree_with_python(data: st.DataObject, column: str, sign: str) -> None:
    strategy = VALUES[column][1]
    values = data.draw(st.lists(st.none() | strategy, min_size=1, max_size=8))
    wanted = data.draw(strategy.filter(lambda value: "," not in str(value)) | st.sampled_from(values))
    if wanted is None:
        wanted = data.draw(strategy)
    facts = table(column, values)
    expected = [i for i, value in enumerate(values) if value is not None and COMPARE[sign](value, wanted)]
    assert matched(facts, f"{column}{sign}{wanted}") == expected


@settings(max_examples=300)
@given(values=st.lists(st.none() | TEXTS, min_size=1, max_size=8), pattern=TEXTS)
def test_patterns_agree_with_fnmatch(values: list[str | None], pattern: str) -> None:
    expected = [i for i, value in enumerate(values) if value is not None and fnmatch.fnmatchcase(value, pattern)]
    assert matched(table("text", values), f"text~{pattern}") == expected


@settings(max_examples=100)
@given(
    values=st.lists(st.none() | st.integers(-4, 4), min_size=1, max_size=8),
    wanted=st.lists(st.integers(-5, 5), min_size=1),
)
def test_commas_join_values_of_which_one_must_match(values: list[int | None], wanted: list[int]) -> None:
    expected = [i for i, value in enumerate(values) if value is not None and value in wanted]
    assert matched(table("whole", values), f"whole={','.join(map(str, wanted))}") == expected


@settings(max_examples=100)
@given(values=st.lists(st.tuples(st.none() | st.integers(-3, 3), st.none() | st.sampled_from("abc")), max_size=10))
def test_all_terms_must_hold(values: list[tuple[int | None, str | None]]) -> None:
    whole, text = pa.array([row[0] for row in values], pa.int64()), pa.array([row[1] for row in values], pa.string())
    facts = pa.table({"index": pa.array(range(len(values)), pa.int64()), "whole": whole, "text": text})
    expected = [i for i, (n, c) in enumerate(values) if n is not None and c is not None and n > -1 and c != "b"]
    assert matched(facts, "whole>-1", "text!=b") == expected
    assert matched(facts) == list(range(len(values)))


@pytest.mark.parametrize("term", ["text=", "text=a", "text!=a", "text>a", "text<z", "text>=a", "text<=z", "text~*"])
def test_nulls_never_match(term: str) -> None:
    assert matched(table("text", [None, None]), term) == []


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("runs/*/step-*", [0, 1]),
        ("r*s*1*", [0, 1]),
        ("runs/?/step-10", [1]),
        ("runs/[!b]/*", [0]),
        ("runs", []),
        ("[b-a]*", []),
    ],
)
def test_shell_patterns(pattern: str, expected: list[int]) -> None:
    facts = table("text", ["runs/a/step-1", "runs/b/step-10", "x/runs/a/step-1", None])
    assert matched(facts, f"text~{pattern}") == expected


def test_an_unknown_value_is_neither_above_nor_below() -> None:
    facts = table("real", [float("nan"), 0.5])
    assert matched(facts, "real>0") == [1]
    assert matched(facts, "real<=0.5") == [1]
    assert matched(facts, "real=nan") == [0]


def test_bools_are_values_too() -> None:
    facts = pa.table({"index": [0, 1, 2], "frozen": [True, False, None]})
    assert matched(facts, "frozen=true") == [0]
    assert matched(facts, "frozen!=true") == [1]


def test_an_unknown_fact_names_the_nearest() -> None:
    with pytest.raises(UnknownFactError, match=r"unknown fact 'txet'; did you mean 'text'\?"):
        matched(table("text", ["a"]), "txet=a")


@pytest.mark.parametrize("term", ["", "text", "=a", "text a", '"text=a', "text!a"])
def test_a_malformed_term_shows_how_to_write_one(term: str) -> None:
    with pytest.raises(CorpusError, match=f"'{term}' is no query; write for instance architecture=resnet20"):
        matched(table("text", ["a"]), term)


@pytest.mark.parametrize("term", ["whole=1.5", "whole>many", "whole=1,two", "whole="])
def test_a_value_of_another_type_is_named(term: str) -> None:
    with pytest.raises(CorpusError, match=f"'{term}': .* is no int64; give a value of that type"):
        matched(table("whole", [1]), term)


def test_a_pattern_on_a_number_is_refused() -> None:
    with pytest.raises(CorpusError, match=r"'whole~1\*': whole is a number; compare it by"):
        matched(table("whole", [1]), "whole~1*")


def test_a_corpus_is_queried_by_its_facts(tmp_path: Path) -> None:
    corpus, states = builders.small_corpus(tmp_path)
    assert corpus.query(["split=train", "step>=598"]).column("checkpoint_id").to_pylist() == ["narrow598", "narrow599"]
    found = {facts["checkpoint_id"]: state for facts, state in corpus.checkpoints(["split!=train"])}
    assert sorted(found) == ["base0", "held0", "held1", "held2", "held3"]
    for name, state in found.items():
        builders.assert_same_bits(state, states[name])
