"""State dicts are found where people put them, and only there."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raywgen.weights import WeightsError
from raywgen.weights.nested import choose_networks, split_prefix

WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "network", "net", "weights", "params")


def find_state_dict(content: Any, leaf: type, source: str) -> dict[str, Any]:
    ((_, network),) = choose_networks(content, leaf, source).networks
    return network.state


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


T = torch.ones(2, 2)
REFUSED: dict[str, tuple[Any, str]] = {
    "nothing": ({}, r"holds no state_dict \(it is empty\); save module\.state_dict\(\) alone"),
    "an empty list": ([], r"a list of 0"),
    "None": (None, "a NoneType"),
    "a number": (3, "a int"),
    "a list of tensors": ([T], "a list of 1"),
    "a tensor": (torch.ones(3, 148), r"one tensor \[3, 148\]"),
    "tensors by number": ({0: T}, "keys '0'"),
    "empty": ({"model": {}}, "keys 'model'"),
    "a name that is a number": ({"model": {"a": T, 4: T}}, "keys 'model'"),
    "metrics": ({"epoch": 3, "best": torch.tensor(0.5)}, "keys 'epoch', 'best'"),
    "a list among tensors": ({"a": T, "b": T, "history": [1.0]}, "entry 'history' among its tensors is a list"),
    "moments": ({"state": {0: {"exp_avg": T}}, "param_groups": []}, "an optimizer's state"),
    "moments alone": ({"state": {0: {"exp_avg": T, "exp_avg_sq": T, "step": T}}}, "an optimizer's state"),
    "several": ({"encoder": {"a": T}, "decoder": {"b": T}}, r"holds 2 networks: 'encoder', 'decoder'; .*--select KEY"),
    "several usual ones": ({"model": {"a": T}, "net": {"b": T}}, r"holds 2 networks: 'model', 'net'"),
    "a list of networks": ([{"a": T}, {"a": T}], r"holds 2 networks: '0', '1'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_holds_no_network_or_several_is_refused_with_what_was_found(name: str) -> None:
    content, message = REFUSED[name]
    with pytest.raises(WeightsError, match=rf"^a/b\.pt .*{message}"):
        find_state_dict(content, torch.Tensor, "a/b.pt")


def test_a_mapping_that_holds_itself_ends() -> None:
    content: dict[str, Any] = {}
    content["model"] = content
    with pytest.raises(WeightsError, match="holds no state_dict"):
        find_state_dict(content, torch.Tensor, "file")


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"model": {"state_dict": {"net": {"a": T}}}}, "model.state_dict.net"),
        ({"checkpoint": {"model": {"a": T}}}, "checkpoint.model"),
        ([{"a": T}], "0"),
        ({"a": T, "epoch": 3, "name": "x", "none": None}, ""),
        ({"model": {"a": T}, "optimizer": {"state": {0: {"exp_avg": T}}}, "rng": [T], "metrics": {"x": T}}, "model"),
    ],
)
def test_a_single_network_is_found_wherever_it_lies(content: Any, key: str) -> None:
    ((name, network),) = choose_networks(content, torch.Tensor, "file").networks
    assert (name, network.key, list(network.state)) == (None, key, ["a"])


def test_networks_are_selected_by_key_and_pattern_and_the_others_are_listed() -> None:
    content = {"model": {"a": T}, "ema": {"a": T}, "nest": {"x": {"a": T}, "y": {"a": T}}}
    usual = choose_networks(content, torch.Tensor, "file")
    assert [network.key for _, network in usual.networks] == ["model"]
    assert usual.others == ("ema", "nest.x", "nest.y")
    for select, keys in {
        "ema": [None],
        "nest.*": ["nest.x", "nest.y"],
        "*": ["model", "ema", "nest.x", "nest.y"],
    }.items():
        assert [key for key, _ in choose_networks(content, torch.Tensor, "file", [select]).networks] == keys
    with pytest.raises(WeightsError, match=r"4 networks: 'model'.*choose by `--select KEY`"):
        choose_networks(content, torch.Tensor, "file", ["none"])


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
