"""Weights files come back bit for bit, or are refused by name with a remedy; nothing pickled ever runs."""

from __future__ import annotations

import builtins
import json
import os
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from raywgen.weights import StateDict, UnsafeFileError, WeightsError, copy_plan
from raywgen.weights import reader as reader_module
from raywgen.weights.packed import PackedCheckpoint, pack
from raywgen.weights.reader import WeightsReader, load_pickled
from tests.weights.test_layout import assert_bit_equal, raw_bytes

COMMON = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
NEWER = ("float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64")

names = st.lists(
    st.from_regex(r"[a-zA-Z_]{1,5}(\.[a-z0-9é ]{1,6}){0,3}", fullmatch=True), min_size=1, max_size=6, unique=True
)
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@st.composite
def bit_patterns(draw: st.DrawFn, dtypes: tuple[str, ...]) -> StateDict:
    """Random bits in every dtype, NaN and infinity among them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    state: StateDict = {}
    for name in draw(names):
        dtype = getattr(torch, draw(st.sampled_from(dtypes)))
        shape = draw(shapes)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        raw = rng.integers(0, 2 if dtype == torch.bool else 256, size, dtype=np.uint8)
        state[name] = torch.from_numpy(raw).view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)
    return state


def unpacked(checkpoint: PackedCheckpoint) -> StateDict:
    assert len(checkpoint.packed_P) == checkpoint.layout.num_bytes
    return checkpoint.layout.unpack(torch.from_numpy(checkpoint.packed_P))


def read(path: Path) -> StateDict:
    return unpacked(WeightsReader().read(path))


@given(state=bit_patterns(COMMON + NEWER))
@settings(max_examples=60)
def test_safetensors_come_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, state: StateDict) -> None:
    path = tmp_path_factory.getbasetemp() / "round.safetensors"
    save_file(state, path, {"note": "metadata is no tensor"})
    found = read(path)
    assert set(found) == set(state)
    assert_bit_equal({name: found[name] for name in state}, state)
    loaded = load_file(path)
    assert_bit_equal({name: found[name] for name in loaded}, loaded)


@given(
    state=bit_patterns(COMMON + NEWER),
    wrapper=st.sampled_from(["", "state_dict", "model_state_dict", "model", "module", "net"]),
    prefix=st.sampled_from(["", "module.", "_orig_mod.", "module._orig_mod."]),
)
@settings(max_examples=60)
def test_torch_files_come_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, state: StateDict, wrapper: str, prefix: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "round.pt"
    named = {prefix + name: tensor for name, tensor in state.items()}
    torch.save({wrapper: named, "epoch": 3} if wrapper else named, path)
    checkpoint = WeightsReader().read(path)
    assert checkpoint.prefix == prefix
    assert_bit_equal(unpacked(checkpoint), state)
    loaded = torch.load(path, weights_only=True)
    assert_bit_equal({prefix + name: t for name, t in unpacked(checkpoint).items()}, loaded.get(wrapper, loaded))


@given(state=bit_patterns(COMMON), wrapper=st.sampled_from(["", "state_dict", "model"]), ordered=st.booleans())
@settings(max_examples=60)
def test_legacy_torch_files_come_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, state: StateDict, wrapper: str, ordered: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "round.pth"
    named = OrderedDict(state) if ordered else state
    torch.save({wrapper: named} if wrapper else named, path, _use_new_zipfile_serialization=False)
    assert not path.read_bytes().startswith(b"PK")
    assert_bit_equal(read(path), state)


@given(seed=st.integers(0, 2**32), dtype=st.sampled_from([*COMMON, "float8_e5m2"]), zipped=st.booleans())
@settings(max_examples=60)
def test_strided_and_tied_tensors_come_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, seed: int, dtype: str, zipped: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = (torch.randn(4, 6, generator=generator) * 9).to(getattr(torch, dtype))
    views = {
        "whole": base,
        "tied": base,
        "turned": base.t(),
        "row": base[2],
        "column": base[:, 1],
        "every.other": base[::2, 1::2],
        "one.of.a.column": base[::4, 3],
        "nothing": base[4:],
        "scalar": base[1, 2],
        "spread": base[:1, :1].expand(3, 2),
        "middle": base[1:3],
        "tied.parameter": nn.Parameter(base, requires_grad=False),
    }
    chosen = torch.randperm(len(views), generator=generator)[: 1 + seed % len(views)].tolist()
    state = {name: views[name] for name in (list(views)[index] for index in chosen)}
    path = tmp_path_factory.getbasetemp() / "views.pt"
    torch.save(state, path, _use_new_zipfile_serialization=zipped or dtype == "float8_e5m2")
    expected = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    assert_bit_equal(read(path), expected)
    loaded = torch.load(path, weights_only=True)
    assert {name: tensor.tolist() for name, tensor in read(path).items()} == {n: t.tolist() for n, t in loaded.items()}


@pytest.mark.parametrize("zipped", [True, False])
def test_negated_and_conjugated_views_come_back_as_their_values(tmp_path: Path, zipped: bool) -> None:
    state = {
        "minus": torch.arange(3.0)._neg_view(),
        "one": torch.tensor([1 + 2j]).conj().imag,
        "conj": torch.tensor([1 + 2j, 3 - 4j]).conj(),
    }
    path = tmp_path / "model.pt"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    found = read(path)
    assert found["minus"].tolist() == [0.0, -1.0, -2.0]
    assert found["one"].tolist() == [-2.0]
    assert found["conj"].tolist() == [1 - 2j, 3 + 4j]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_a_whole_training_state_gives_its_model(tmp_path: Path, zipped: bool, prefix: str) -> None:
    module = network()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    for _ in range(3):
        module(torch.randn(6, 5)).square().mean().backward()
        optimizer.step()
        schedule.step()
    content = {
        "optimizer": optimizer.state_dict(),
        "scheduler": schedule.state_dict(),
        "epoch": 3,
        "history": [0.5, None, "note"],
        "model": OrderedDict((prefix + name, tensor) for name, tensor in module.state_dict().items()),
    }
    path = tmp_path / "last.pt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    checkpoint = WeightsReader().read(path)
    assert checkpoint.prefix == prefix
    assert_bit_equal(unpacked(checkpoint), dict(module.state_dict()))
    kinds = {spec.name: spec.kind for spec in checkpoint.layout.tensors}
    assert (kinds["1.weight"], kinds["1.num_batches_tracked"]) == ("norm_scale", "counter")


def save(state: StateDict, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization="legacy" not in path.name)
    return path


SUFFIXES = (".safetensors", ".pt", ".legacy.pt", ".pth", ".th", ".bin")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_files_of_one_layout_share_its_plan_and_keep_their_own_values(tmp_path: Path, suffix: str) -> None:
    generator = torch.Generator().manual_seed(0)
    others = [{"x": torch.ones(width)} for width in range(1, 5)]
    reader = WeightsReader()
    layouts = []
    for index in range(20):
        state = {"a.weight": torch.randn(3, 4, generator=generator), "a.step": torch.tensor([index])}
        checkpoint = reader.read(save(state, tmp_path / f"{index}{suffix}"))
        layouts.append(checkpoint.layout)
        found = unpacked(checkpoint)
        assert_bit_equal({name: found[name] for name in state}, state)
        other = others[index % len(others)]
        assert_bit_equal(unpacked(reader.read(save(other, tmp_path / f"other{index}{suffix}"))), other)
    assert all(layout is layouts[0] for layout in layouts)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_plan_is_made_once_for_many_files(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    make_plan = copy_plan._copy_plan

    def counting(*arguments: Any) -> Any:
        made.append(arguments)
        return make_plan(*arguments)

    monkeypatch.setattr(copy_plan, "_copy_plan", counting)
    reader = WeightsReader()
    for index in range(10):
        path = save({"a": torch.full((3,), float(index))}, tmp_path / f"{index}{suffix}")
        assert unpacked(reader.read(path))["a"].tolist() == [index] * 3
    assert len(made) == 1


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_more_layouts_than_plans_are_kept(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "_MAX_PLANS", 3)
    reader = WeightsReader()
    states = [{"a": torch.arange(width, dtype=torch.float32)} for width in range(1, 7)]
    for index in [0, 1, 2, 3, 4, 5, 0, 0, 5, 2, 1, 4, 3]:
        path = save(states[index], tmp_path / f"{index}{suffix}")
        assert_bit_equal(unpacked(reader.read(path)), states[index])
        assert len(reader._plans) <= 3


@pytest.mark.parametrize("change", [lambda raw: raw[:-1], lambda raw: raw + b"\0", lambda raw: raw[: len(raw) // 2]])
def test_a_known_layout_does_not_let_a_damaged_file_pass(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    reader = WeightsReader()
    path = save({"a": torch.ones(40)}, tmp_path / "model.safetensors")
    reader.read(path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(WeightsError, match=r"model\.safetensors .*fetch it again"):
        reader.read(path)


class Calls:
    """A pickle of it, read without care, calls the function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def touch(path: str) -> None:
    Path(path).touch()


TRAPS: dict[str, Callable[[str], Calls]] = {
    "os.system": lambda marker: Calls(os.system, f"touch {marker}"),
    "builtins.eval": lambda marker: Calls(builtins.eval, f"open({marker!r}, 'w').close()"),
    "builtins.exec": lambda marker: Calls(builtins.exec, f"open({marker!r}, 'w').close()"),
    "a function": lambda marker: Calls(touch, marker),
    "os.mkdir": lambda marker: Calls(os.mkdir, marker),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("place", ["alone", "beside", "model", "key"])
@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
@pytest.mark.parametrize("trap", TRAPS)
def test_pickled_code_is_never_executed(tmp_path: Path, trap: str, form: str, place: str) -> None:
    marker, path = tmp_path / "executed", tmp_path / "model.pt"
    call = TRAPS[trap](str(marker))
    weights = torch.ones(2)
    content = {
        "alone": call,
        "beside": {"weight": weights, "trap": call},
        "model": {"model": {"weight": weights}, "optimizer": call},
        "key": {"model": {"weight": weights}, call: 1},
    }[place]
    if form == "bare":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    reader = WeightsReader()
    reader.read(save({"weight": weights}, tmp_path / "harmless.pt"))
    for _ in range(2):
        with pytest.raises(UnsafeFileError, match=r"model\.pt holds pickled code .* never executed.*\.safetensors"):
            reader.read(path)
    with pytest.raises(UnsafeFileError):
        load_pickled(path)
    assert not marker.exists()
    torch.load(path, weights_only=False) if form != "bare" else pickle.loads(path.read_bytes())
    assert marker.exists(), "the trap itself must work, or the test shows nothing"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_missing_empty_and_unreadable_files_are_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    with pytest.raises(WeightsError, match=rf"model{suffix} does not exist; give \.safetensors, \.pt"):
        read(path)
    path.write_bytes(b"")
    with pytest.raises(WeightsError, match=rf"model{suffix} is truncated or no .* file.*; fetch it again"):
        read(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(WeightsError, match=rf"model{suffix} cannot be read .*check the file"):
        read(path)


@pytest.mark.parametrize("name", ["model.xyz", "model.pt.gz"])
def test_unknown_kinds_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(WeightsError, match=rf"{name}: unknown kind of weights file; give \.safetensors, .*\.bin"):
        read(tmp_path / name)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".legacy.pt"])
def test_files_cut_anywhere_are_refused(tmp_path: Path, suffix: str) -> None:
    path = save({"layer.weight": torch.randn(6, 5), "step": torch.tensor(3)}, tmp_path / f"model{suffix}")
    whole = path.read_bytes()
    lengths = {0, 1, 7, 8, 9, len(whole) - 1, *np.linspace(0, len(whole) - 1, 60).astype(int).tolist()}
    for length in sorted(lengths):
        path.write_bytes(whole[:length])
        with pytest.raises(WeightsError, match=rf"model{suffix} .*(fetch it again|save the state_dict alone)"):
            read(path)


def safetensors_file(path: Path, header: object, body: bytes, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + body)
    return path


def row(dtype: str, shape: list[int], first: int, last: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


WRONG_HEADERS: dict[str, tuple[object, bytes]] = {
    "overlap": ({"a": row("U8", [4], 0, 4), "b": row("U8", [4], 2, 6)}, bytes(6)),
    "the same bytes twice": ({"a": row("U8", [4], 0, 4), "b": row("U8", [4], 0, 4)}, bytes(4)),
    "a gap": ({"a": row("U8", [2], 0, 2), "b": row("U8", [2], 4, 6)}, bytes(6)),
    "a late start": ({"a": row("U8", [2], 2, 4)}, bytes(4)),
    "offsets turned round": ({"a": row("U8", [2], 2, 0)}, bytes(2)),
    "offsets for another shape": ({"a": row("F32", [2], 0, 4)}, bytes(4)),
    "too few values": ({"a": row("F32", [2], 0, 8)}, bytes(7)),
    "too many values": ({"a": row("F32", [2], 0, 8)}, bytes(9)),
    "a negative length": ({"a": row("U8", [-2], 0, 2)}, bytes(2)),
    "a length beyond any number": ({"a": row("U8", [2**64], 0, 2)}, bytes(2)),
    "a length no tensor has": ({"a": row("U8", [0, 2**63], 0, 0)}, b""),
    "lengths that overflow": ({"a": row("U8", [2**40, 2**40, 0], 0, 0)}, b""),
    "a dtype nobody knows": ({"a": row("F99", [2], 0, 2)}, bytes(2)),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 2]}}, bytes(2)),
    "a row as a list": ({"a": ["U8", [2], [0, 2]]}, bytes(2)),
    "a row as a number": ({"a": 3}, b""),
    "a list": ([1, 2], b""),
    "no JSON": (b"{nothing}", b""),
    "no text": (b"{\xff\xfe}", b""),
    "nested too deep": (b'{"a":' + b"[" * 100_000, b""),
}


@pytest.mark.parametrize("name", WRONG_HEADERS)
def test_safetensors_with_a_wrong_header_are_refused(tmp_path: Path, name: str) -> None:
    path = safetensors_file(tmp_path / "model.safetensors", *WRONG_HEADERS[name])
    with pytest.raises(WeightsError, match=r"model\.safetensors.*fetch it again"):
        read(path)


@pytest.mark.parametrize("length", [0, 1, 5, 60, 62, 69, 70, 1000, 101 << 20, 2**63, 2**64 - 1])
def test_safetensors_with_a_wrong_header_length_are_refused(tmp_path: Path, length: int) -> None:
    header = {"a": row("F32", [2], 0, 8)}
    assert len(json.dumps(header)) == 61
    path = safetensors_file(tmp_path / "model.safetensors", header, bytes(8), length)
    with pytest.raises(WeightsError, match=r"model\.safetensors is truncated or no safetensors file.*fetch it again"):
        read(path)


def test_safetensors_with_a_dtype_that_no_layout_has_name_those_it_may_have(tmp_path: Path) -> None:
    path = safetensors_file(tmp_path / "model.safetensors", {"a": row("F6_E2M3", [4], 0, 3)}, bytes(3))
    with pytest.raises(WeightsError, match=r"model\.safetensors: dtype F6_E2M3 is not known; give one of F64, F32"):
        read(path)


@pytest.mark.parametrize("header", [{}, {"__metadata__": {"a": "b"}}])
def test_safetensors_without_tensors_are_refused(tmp_path: Path, header: object) -> None:
    path = safetensors_file(tmp_path / "model.safetensors", header, b"")
    with pytest.raises(WeightsError, match=r"model\.safetensors holds no tensor; give a checkpoint"):
        read(path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("content", [{"epoch": 3}, {}, [torch.ones(2)], torch.ones(2), {0: torch.ones(1)}, "text"])
def test_torch_files_without_a_state_dict_are_refused(tmp_path: Path, content: object, zipped: bool) -> None:
    torch.save(content, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match=r"model\.pt holds no state_dict \(.*save module\.state_dict\(\) alone"):
        read(tmp_path / "model.pt")


UNUSUAL: dict[str, Callable[[], Tensor]] = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "sparse rows": lambda: torch.eye(3).to_sparse_csr(),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "without values": lambda: torch.empty(3, device="meta"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", UNUSUAL)
def test_tensors_that_are_not_dense_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    tensor = UNUSUAL[kind]()
    torch.save({"first": torch.ones(1), "odd": tensor}, tmp_path / "model.pt")
    with pytest.raises(WeightsError, match=r"model\.pt: tensor 'odd' is sparse, quantised, .*; save it dense"):
        read(tmp_path / "model.pt")
    with pytest.raises(WeightsError, match=r"memory: tensor 'odd' is sparse"):
        pack({"odd": tensor}, "memory")


def test_an_empty_state_dict_in_memory_is_refused() -> None:
    with pytest.raises(WeightsError, match=r"state_dict is empty"):
        pack({}, "memory")


def test_packing_leaves_the_state_dict_as_it_was() -> None:
    state = {"module.a": torch.ones(3, 4).t(), "module.b": nn.Parameter(torch.ones(2))}
    before = dict(state)
    checkpoint = pack(state, "memory")
    checkpoint.packed_P[:] = 0
    assert checkpoint.prefix == "module."
    assert list(state) == list(before)
    assert all(state[name] is before[name] and state[name].sum() == before[name].numel() for name in state)
    assert raw_bytes(state["module.b"].detach()) == raw_bytes(torch.ones(2))
