"""Layouts: round trips in every dtype, refusals by name.

Shape legend: N networks, D values of the flat vector, P packed bytes.
"""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from raywgen.weights import Layout, LayoutMismatchError, NonFiniteWeightsError, StateDict, WeightsError

FLOATS = ("float32", "float16", "bfloat16", "float64", "float8_e4m3fn")
COUNTERS = ("int64", "int32", "uint8", "bool")

names = st.lists(
    st.from_regex(r"[a-z]{1,5}(\.[a-z0-9]{1,6}){0,2}", fullmatch=True), min_size=1, max_size=6, unique=True
)
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@st.composite
def state_dicts(draw: st.DrawFn, floats: tuple[str, ...] = FLOATS, counters: tuple[str, ...] = COUNTERS) -> StateDict:
    """At least one floating-point tensor; values are random bits where the dtype has no NaN, else random normals."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    state: StateDict = {}
    for index, name in enumerate(draw(names)):
        dtype = draw(st.sampled_from(floats if index == 0 else floats + counters))
        values = torch.randn(draw(shapes), generator=generator)
        state[name] = (values * 50).to(getattr(torch, dtype)) if dtype in counters else values.to(getattr(torch, dtype))
    return state


def assert_bit_equal(actual: StateDict, expected: StateDict) -> None:
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert actual[name].shape == tensor.shape
        assert raw_bytes(actual[name]) == raw_bytes(tensor), name


def raw_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@given(state_dicts())
@settings(max_examples=80)
def test_pack_and_unpack_keep_every_bit(state: StateDict) -> None:
    layout = Layout.from_state_dict(state)
    layout.check(state)
    packed_P = layout.pack(state)
    assert packed_P.shape == (layout.num_bytes,)
    assert_bit_equal(layout.unpack(packed_P), state)


@given(state_dicts(floats=("float32", "float16", "bfloat16", "float8_e4m3fn")))
@settings(max_examples=80)
def test_flatten_and_unflatten_keep_every_bit(state: StateDict) -> None:
    # float64 is left out: the flat vector is float32 by definition.
    layout = Layout.from_state_dict(state)
    values_D = layout.flatten(state)
    assert values_D.dtype == torch.float32
    assert values_D.shape == (layout.num_values,)
    assert_bit_equal(layout.unflatten(values_D, counters=state), state)


@given(state_dicts(), st.integers(1, 4), st.integers(0, 2**32))
@settings(max_examples=60)
def test_a_stack_of_networks_agrees_with_one_after_another(state: StateDict, num: int, seed: int) -> None:
    layout = Layout.from_state_dict(state)
    values_ND = torch.randn(num, layout.num_values, generator=torch.Generator().manual_seed(seed))
    stacked = layout.unflatten(values_ND, counters=state)
    singles = [layout.unflatten(values_D, counters=state) for values_D in values_ND]
    packed_NP = torch.stack([layout.pack(single) for single in singles])
    unpacked = layout.unpack(packed_NP)
    for index, single in enumerate(singles):
        assert_bit_equal({name: tensor[index] for name, tensor in stacked.items()}, single)
        assert_bit_equal({name: tensor[index] for name, tensor in unpacked.items()}, single)
    expected_ND = torch.stack([layout.flatten(single) for single in singles])
    assert torch.equal(layout.values(packed_NP), expected_ND)


@given(state_dicts())
@settings(max_examples=40)
def test_json_round_trip_keeps_layout_and_id(state: StateDict) -> None:
    layout = Layout.from_state_dict(state)
    again = Layout.from_json(json.loads(json.dumps(layout.to_json())))
    assert again == layout
    assert again.id == layout.id
    assert again.byte_offsets == layout.byte_offsets


def test_every_tensor_starts_at_a_multiple_of_eight() -> None:
    layout = Layout.from_state_dict({"a": torch.ones(3, dtype=torch.bool), "b": torch.ones(3), "c": torch.tensor(7)})
    assert layout.byte_offsets == (0, 8, 24, 32)
    assert layout.num_values == 3


def test_values_are_a_view_where_all_is_float32_without_gaps() -> None:
    layout = Layout.from_state_dict(nn.Linear(6, 4).state_dict())
    packed_NP = torch.zeros(3, layout.num_bytes, dtype=torch.uint8)
    assert layout.values(packed_NP).data_ptr() == packed_NP.data_ptr()


def test_unpack_accepts_rows_that_lie_askew_in_memory() -> None:
    state = {"a": torch.randn(3), "b": torch.randn(5).double()}
    layout = Layout.from_state_dict(state)
    askew = torch.cat([torch.zeros(3, dtype=torch.uint8), layout.pack(state)])[3:]
    assert_bit_equal(layout.unpack(askew), state)


def test_another_form_takes_over_which_tensors_are_constants() -> None:
    state = {"weight": torch.randn(3, 2), "table": torch.randn(4), "bias": torch.randn(3)}
    known = Layout.from_state_dict(state).with_constants(["table"])
    form = Layout.from_state_dict(dict(reversed(state.items())))
    arranged = form.arranged_like(known)
    assert torch.equal(arranged.flatten(state), known.flatten(state))
    assert [spec.name for spec in arranged.tensors if spec.is_constant] == ["table"]
    # The other way round: what the known form generates is generated, whatever the form itself marked.
    marked = form.with_constants(["bias", "table"]).arranged_like(Layout.from_state_dict(state))
    assert marked.num_values == 13


def test_missing_counters_are_zero_and_given_ones_are_copied() -> None:
    module = nn.BatchNorm1d(4)
    module(torch.randn(8, 4))
    state = module.state_dict()
    layout = Layout.from_state_dict(state)
    values_D = layout.flatten(state)
    assert layout.unflatten(values_D)["num_batches_tracked"] == 0
    kept = layout.unflatten(values_D, counters=state)["num_batches_tracked"]
    state["num_batches_tracked"] += 1
    assert kept == 1


def test_kinds_of_a_real_network() -> None:
    module = nn.ModuleDict(
        {
            "embed": nn.Embedding(5, 4),
            "convolution": nn.Conv2d(1, 2, 3),
            "norm": nn.BatchNorm2d(2),
            "head": nn.Linear(4, 2),
        }
    )
    layout = Layout.from_state_dict(module.state_dict())
    assert {spec.name: spec.kind for spec in layout.tensors} == {
        "embed.weight": "embedding",
        "convolution.weight": "weight",
        "convolution.bias": "bias",
        "norm.weight": "norm_scale",
        "norm.bias": "norm_shift",
        "norm.running_mean": "running_mean",
        "norm.running_var": "running_var",
        "norm.num_batches_tracked": "counter",
        "head.weight": "weight",
        "head.bias": "bias",
    }


def test_id_depends_on_names_shapes_and_kinds() -> None:
    variants = [
        {"a": torch.zeros(2, 3)},
        {"b": torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2)},
        {"a": torch.zeros(2, 3).int()},
    ]
    assert len({Layout.from_state_dict(state).id for state in variants}) == len(variants)


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        (lambda state: state.pop("bias"), LayoutMismatchError, "'bias' is missing"),
        (lambda state: state.update(extra=torch.ones(1)), LayoutMismatchError, "'extra' is not in the layout"),
        (lambda state: state.update(bias=torch.ones(3)), LayoutMismatchError, r"float32\[3\].*float32\[2\]"),
        (lambda state: state.update(bias=torch.ones(2).half()), LayoutMismatchError, r"float16\[2\].*float32\[2\]"),
        (lambda state: state.update(bias=torch.tensor([1.0, float("nan")])), NonFiniteWeightsError, "'bias' holds NaN"),
        (lambda state: state.update(bias=torch.tensor([1.0, float("inf")])), NonFiniteWeightsError, "'bias' holds NaN"),
    ],
)
def test_check_names_source_and_tensor(change, error: type[WeightsError], named: str) -> None:
    state = dict(nn.Linear(3, 2).state_dict())
    layout = Layout.from_state_dict(state)
    change(state)
    with pytest.raises(error, match=f"run/7.pt: tensor .*{named}"):
        layout.check(state, source="run/7.pt")


def test_a_float64_beyond_float32_is_refused_since_the_flat_vector_would_hold_infinity() -> None:
    state = {"a": torch.tensor([1e300], dtype=torch.float64)}
    with pytest.raises(NonFiniteWeightsError, match="'a'"):
        Layout.from_state_dict(state).check(state)


def test_no_layout_of_nothing_or_of_what_is_no_tensor() -> None:
    with pytest.raises(WeightsError, match="empty"):
        Layout.from_state_dict({})
    with pytest.raises(WeightsError, match="'epoch' is a int"):
        Layout.from_state_dict({"epoch": 3})  # pyright: ignore[reportArgumentType]


def test_a_vector_of_another_length_is_refused() -> None:
    layout = Layout.from_state_dict({"a": torch.zeros(4)})
    with pytest.raises(LayoutMismatchError, match="3 values do not fill a layout of 4"):
        layout.unflatten(torch.zeros(3))
