"""Files whose values are written part by part are those that are written at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from raywgen.weights import Layout, WeightsError, load_state_dict, save_state_dict
from raywgen.weights.safetensors_parts import index_json, layout_ties, tensor_files, values_checksum
from raywgen.weights.tensors import StateDict, find_ties

METADATA = {"task": "é", "log_prob": "-1.5"}


def state(dtype: torch.dtype = torch.float32) -> StateDict:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "z.weight": torch.randn(7, 5, generator=generator).to(dtype),
        "empty": torch.zeros(0, 3),
        "a.half": torch.randn(9, generator=generator).half(),
        "count": torch.tensor(4),
        "wave": torch.randn(3, 2, generator=generator).to(torch.complex64),
        "flags": torch.tensor([True, False, True]),
    }
    return {**tensors, "tied": tensors["z.weight"]}


def written(path: Path, layout: Layout, values_D: torch.Tensor, kept: StateDict, steps: int, max_bytes: int = 0) -> str:
    files = tensor_files(layout, METADATA | {"log_prob": "-" + "0" * 24}, max_bytes)
    paths = [path.with_suffix(f".{place}") for place in range(len(files))]
    for file, each in zip(files, paths, strict=True):
        file.create(each)
        for start in reversed(range(0, len(values_D), steps)):
            file.write_values(each, start, values_D[start : start + steps], lambda _: None)
        assert each.stat().st_size == file.num_bytes
        file.finish(each, kept, METADATA | layout_ties(layout))
    return values_checksum(files, paths, 3, len(values_D) - 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("max_bytes", [0, 100])
def test_parts_in_any_order_make_the_same_tensors(tmp_path: Path, dtype: torch.dtype, max_bytes: int) -> None:
    tensors = state(dtype)
    layout = Layout.from_state_dict(tensors)
    assert layout_ties(layout) == find_ties(tensors) == {"tied": "z.weight"}
    values_D = layout.flatten(tensors)
    checksums = {written(tmp_path / f"by-{n}", layout, values_D, tensors, n, max_bytes) for n in (1, 4, 1000)}
    assert len(checksums) == 1
    wanted = layout.unflatten(values_D, counters=tensors)
    found: StateDict = {}
    for path in sorted(tmp_path.glob("by-4.*")):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt", "tied": "z.weight", **METADATA}
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].equal(tensor), name


def test_a_file_of_floats_and_counters_lies_as_the_library_has_it(tmp_path: Path) -> None:
    tensors = {"z": torch.randn(3, 4), "n": torch.tensor(2), "a": torch.randn(5)}
    layout = Layout.from_state_dict(tensors)
    written(tmp_path / "mine", layout, layout.flatten(tensors), tensors, 2)
    save_state_dict(tensors, tmp_path / "whole.safetensors", METADATA)
    mine, whole = (path.read_bytes() for path in (tmp_path / "mine.0", tmp_path / "whole.safetensors"))
    num_data = 4 * 17 + 8
    assert mine[-num_data:] == whole[-num_data:]
    headers = [json.loads(content[8:-num_data]) for content in (mine, whole)]
    assert headers[0] == headers[1]
    assert list(headers[0]) == list(headers[1])
    (tmp_path / "mine.0").rename(tmp_path / "mine.safetensors")
    assert all(tensor.equal(tensors[name]) for name, tensor in load_state_dict(tmp_path / "mine.safetensors").items())


def test_the_index_names_the_file_of_each_tensor() -> None:
    layout = Layout.from_state_dict(
        {"a": torch.zeros(10), "b": torch.zeros(30), "c": torch.zeros(2), "d": torch.zeros(2)}
    )
    files = tensor_files(layout, {}, max_bytes=50)
    assert [[spec.name for spec in file.specs] for file in files] == [["a"], ["b"], ["c", "d"]]
    index = json.loads(index_json(["1", "2", "3"], files))
    assert index == {"metadata": {"total_size": 176}, "weight_map": {"a": "1", "b": "2", "c": "3", "d": "3"}}


def test_what_safetensors_cannot_hold_is_named(tmp_path: Path) -> None:
    layout = Layout.from_state_dict({"wide": torch.zeros(2, dtype=torch.complex128)})
    with pytest.raises(WeightsError, match=r"hold no complex128 \(tensor 'wide'\)"):
        tensor_files(layout, {})


def test_a_file_that_finds_no_room_leaves_nothing(tmp_path: Path) -> None:
    (file,) = tensor_files(Layout.from_state_dict({"a": torch.zeros(1 << 50, device="meta")}), {})
    with pytest.raises(OSError, match=r"No space|too large"):
        file.create(tmp_path / "file")
    assert not list(tmp_path.iterdir())
