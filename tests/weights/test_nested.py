"""State dicts are found where people put them, and only there."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raywgen.weights import WeightsError
from raywgen.weights.nested import find_state_dict, split_prefix

WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "network", "net", "weights", "params")
names = st.from_regex(r"[a-z]{1,9}(\.[a-z0-9_]{0,6}){0,3}", fullmatch=True)
state_dicts = st.dictionaries(names, st.floats(), min_size=1, max_size=5)


@given(state=state_dicts, wrappers=st.lists(st.sampled_from(WRAPPERS), max_size=2))
@settings(max_examples=80)
def test_a_state_dict_is_found_under_up_to_two_wrappers(state: dict[str, float], wrappers: list[str]) -> None:
    content: Any = OrderedDict(state)
    for wrapper in wrappers:
        content = {"epoch": 3, wrapper: content, "optimizer": {"state": {}, "lr": "0.1"}}
    found = find_state_dict(content, float, "file")
    assert list(found) == list(state)
    assert all(found[name] is state[name] for name in state)


def test_the_found_mapping_is_a_copy() -> None:
    state = {"a": 1.0}
    find_state_dict(state, float, "file")["b"] = 2.0
    assert state == {"a": 1.0}


def test_a_state_dict_whose_tensor_is_named_like_a_wrapper_is_itself() -> None:
    assert find_state_dict({"model": 1.0, "weights": 2.0}, float, "file") == {"model": 1.0, "weights": 2.0}


def test_the_wrapper_named_first_wins() -> None:
    content = {"params": {"b": 2.0}, "state_dict": {"a": 1.0}, "epoch": 3}
    assert find_state_dict(content, float, "file") == {"a": 1.0}


def cyclic() -> dict[str, Any]:
    content: dict[str, Any] = {}
    content["model"] = content
    return content


@pytest.mark.parametrize(
    "content",
    [
        {},
        [],
        None,
        3,
        [1.0],
        {0: 1.0},
        {"a": 1.0, "step": 3},
        {"model": {}},
        {"model": {"a": 1.0, 4: 2.0}},
        {"model": [1.0]},
        {"weights": {"net": {"network": {"a": 1.0}}}},
        {"teacher": {"a": 1.0}},
        cyclic(),
    ],
    ids=repr,
)
def test_what_holds_none_is_refused_with_the_places_and_a_remedy(content: Any) -> None:
    with pytest.raises(WeightsError, match=r"a/b\.pt holds no state_dict .*state_dict, .*save module\.state_dict\(\)"):
        find_state_dict(content, float, "a/b.pt")


@pytest.mark.parametrize("attribute", ["items", "get", "keys", "values"])
def test_attributes_on_an_ordered_dict_are_not_called(attribute: str) -> None:
    state = OrderedDict(a=1.0)
    setattr(state, attribute, "no function")
    assert find_state_dict(state, float, "file") == {"a": 1.0}
    wrapped = OrderedDict(model=state)
    setattr(wrapped, attribute, "no function")
    assert find_state_dict(wrapped, float, "file") == {"a": 1.0}


@given(
    plain=st.lists(names, min_size=1, max_size=5, unique=True),
    prefixes=st.lists(st.sampled_from(["module.", "_orig_mod."]), max_size=3),
)
@settings(max_examples=80)
def test_prefixes_are_split_off_and_reported(plain: list[str], prefixes: list[str]) -> None:
    rest, shorter = split_prefix(plain)
    before = "".join(prefixes)
    prefix, found = split_prefix([before + name for name in plain])
    assert (prefix, found) == (before + rest, shorter)
    assert [prefix + name for name in found] == [before + name for name in plain]


@pytest.mark.parametrize(
    "plain",
    [
        ["module.a", "b"],
        ["modules.a"],
        ["module."],
        ["module.", "module.a"],
        ["encoder.module.a"],
        ["module"],
    ],
)
def test_what_is_no_prefix_of_every_name_stays(plain: list[str]) -> None:
    assert split_prefix(plain) == ("", plain)


def test_no_names_have_no_prefix() -> None:
    assert split_prefix([]) == ("", [])
