from __future__ import annotations

import json
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raywgen.config import ConfigError
from raywgen.tuning.space import Knob, Values, draw, parse_space

QUANTISER = "train.generator.tokenizer.quantiser.kind"
CONDITIONAL: dict[str, Any] = {
    "train.generator.tokenizer.quantiser.beam": {"choice": [1, 2], "when": {QUANTISER: "residual"}},
    QUANTISER: {"choice": ["residual", "gumbel"]},
    "train.seed": {"int": [0, 3], "when": {"train.generator.tokenizer.quantiser.beam": [1, 2]}},
}


def random_study(seed: int = 0) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))


def draws(space: tuple[Knob, ...], num: int) -> list[Values]:
    study = random_study()
    return [draw(space, study.ask()) for _ in range(num)]


def in_range(knob: Knob, value: Any) -> bool:
    if knob.kind == "choice":
        return value in knob.choices
    return knob.low <= value <= knob.high and isinstance(value, int if knob.kind == "int" else float)


def knobs(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(["choice", "int", "uniform", "loguniform"]))
    if kind == "choice":
        return {"choice": draw(st.lists(st.one_of(st.integers(), st.text()), min_size=1, max_size=4, unique_by=str))}
    if kind == "int":
        low = draw(st.integers(-5, 5))
        return {"int": [low, low + draw(st.integers(1, 9))]}
    low = draw(st.floats(1e-6, 1.0) if kind == "loguniform" else st.floats(-10, 10))
    return {kind: [low, low + draw(st.floats(1e-3, 10))]}


@given(st.dictionaries(st.sampled_from("abcdef"), st.composite(knobs)(), min_size=1), st.integers(0, 99))
def test_what_is_drawn_lies_in_its_range(tree: dict[str, Any], seed: int) -> None:
    space = parse_space(tree)
    drawn = draw(space, random_study(seed).ask())
    assert drawn.keys() == tree.keys()
    assert all(in_range(knob, drawn[knob.key]) for knob in space)


def test_a_conditional_knob_exists_where_its_condition_holds_and_only_there() -> None:
    space = parse_space(CONDITIONAL)
    assert [knob.key for knob in space] == [QUANTISER, "train.generator.tokenizer.quantiser.beam", "train.seed"]
    seen = set()
    for drawn in draws(space, 50):
        has = drawn[QUANTISER] == "residual"
        assert ("train.generator.tokenizer.quantiser.beam" in drawn) == ("train.seed" in drawn) == has
        seen.add(has)
    assert seen == {True, False}


def test_all_conditions_must_hold() -> None:
    when = {QUANTISER: "residual", "train.shot": 1}
    space = parse_space(
        {QUANTISER: CONDITIONAL[QUANTISER], "train.shot": {"choice": [0, 1]}, "b": {"choice": [1], "when": when}}
    )
    seen = set()
    for drawn in draws(space, 60):
        seen.add((drawn[QUANTISER], drawn["train.shot"], "b" in drawn))
    assert seen == {("residual", 1, True), ("residual", 0, False), ("gumbel", 1, False), ("gumbel", 0, False)}


def many_values(spec: dict[str, Any]) -> list[Any]:
    """Returns 300 values of a knob."""
    return [drawn["a"] for drawn in draws(parse_space({"a": spec}), 300)]


def test_whole_numbers_have_both_their_ends() -> None:
    assert set(many_values({"int": [-1, 2]})) == {-1, 0, 1, 2}


def test_each_knob_is_even_on_its_own_scale() -> None:
    """Half of the values lie below the middle, give or take five times the deviation of nine."""
    for kind, middle in (("loguniform", 1e-2), ("uniform", 0.5)):
        assert 105 < sum(value < middle for value in many_values({kind: [1e-4, 1.0]})) < 195, kind


def test_dotted_keys_and_nested_ones_are_the_same() -> None:
    nested = {"train": {"generator": {"tokenizer": {"quantiser": {"kind": {"choice": ["residual", "gumbel"]}}}}}}
    assert parse_space(nested) == parse_space({QUANTISER: {"choice": ["residual", "gumbel"]}})
    when = {"train": {"generator": {"tokenizer": {"quantiser": {"kind": "residual"}}}}}
    both = nested | {"zoo": {"seed": {"int": [0, 1], "when": when}}}
    assert parse_space(both)[1].when == {QUANTISER: ("residual",)}


def test_a_choice_may_be_of_lists() -> None:
    (knob,) = parse_space({"zoo.networks": {"choice": [[[64, 2]], [[64, 8, 2]]]}})
    drawn = draw((knob,), random_study().ask())
    assert json.loads(json.dumps(drawn)) == drawn


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({}, "space is empty"),
        ({"a": 3}, "a is 3; write it as"),
        ({"a": {"choice": [1], "int": [0, 1]}}, "write it as"),
        ({"a": {"choice": []}}, "choice takes values that differ"),
        ({"a": {"choice": [1, 1]}}, "choice takes values that differ"),
        ({"a": {"choice": "ab"}}, "choice takes a list, not 'ab'"),
        ({"a": {"int": [0, 1.5]}}, "int takes two whole numbers"),
        ({"a": {"int": [True, 3]}}, "int takes two whole numbers"),
        ({"a": {"uniform": [1, 0]}}, "a lower and a higher number, not [1, 0]"),
        ({"a": {"uniform": [0, float("inf")]}}, "a lower and a higher number"),
        ({"a": {"loguniform": [0, 1]}}, "a lower and a higher number above 0"),
        ({"a": {"choice": [1], "if": 2}}, "a has if"),
        ({"a": {"choice": [1], "when": 2}}, "`when` takes OTHER_KEY: value"),
        ({"abc": {"choice": [1], "when": {"abz": 1}}, "abd": {"choice": [1]}}, "no knob; did you mean ab"),
        ({"a": {"choice": [1], "when": {"b": 7}}, "b": {"int": [0, 3]}}, "exists when b is 7, which it never is"),
        ({"a": {"int": [0, 1], "when": {"b": 1}}, "b": {"int": [0, 1], "when": {"a": 1}}}, "a, b wait for each other"),
    ],
)
def test_what_is_no_space_is_refused(tree: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_space(tree)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
