"""Weights files: nothing pickled runs, nothing damaged passes for weights, nothing partial is left behind."""

from __future__ import annotations

import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from raywgen.weights import StateDict, UnsafeFileError, WeightsError, load_state_dict, save_state_dict
from tests.weights.test_layout import assert_bit_equal, state_dicts

_SAVE_UNDER_A_FILE_SIZE_LIMIT = """
import resource, sys, torch
from raywgen.weights import WeightsError, save_state_dict
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_state_dict({"weight": torch.ones(300_000)}, sys.argv[1], {})
except WeightsError as error:
    print(error)
    sys.exit(3)
"""


class CreatesFile:
    """A pickle of it, read without care, creates the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def state() -> StateDict:
    generator = torch.Generator().manual_seed(0)
    return {
        "layer.weight": torch.randn(30, 10, generator=generator),
        "layer.half": torch.randn(7, generator=generator).half(),
        "step": torch.tensor(3),
    }


@given(state=state_dicts())
@settings(max_examples=30)
def test_safetensors_round_trip(tmp_path_factory: pytest.TempPathFactory, state: StateDict) -> None:
    path = tmp_path_factory.mktemp("round") / "model.safetensors"
    save_state_dict(state, path, {})
    loaded = load_state_dict(path)
    assert_bit_equal({name: loaded[name] for name in state}, state)
    assert os.listdir(path.parent) == ["model.safetensors"]


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th", ".bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_of_tensors_are_read(tmp_path: Path, state: StateDict, suffix: str, zipped: bool) -> None:
    path = tmp_path / f"model{suffix}"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    assert_bit_equal(load_state_dict(path), state)


def test_metadata_folders_tied_and_strided_tensors(tmp_path: Path) -> None:
    tied = torch.nn.Parameter(torch.randn(3, 4))
    path = tmp_path / "new" / "folder" / "model.safetensors"
    save_state_dict({"a": tied, "b": tied, "c": tied.t()}, path, {"task": "digits"})
    loaded = load_state_dict(path)
    assert torch.equal(loaded["a"], loaded["b"])
    assert torch.equal(loaded["c"], tied.t())
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "task": "digits", "b": "a"}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
def test_pickled_code_is_never_executed(tmp_path: Path, form: str) -> None:
    trap, path = tmp_path / "executed", tmp_path / "model.pt"
    content = {"weight": torch.ones(2), "trap": CreatesFile(trap)}
    if form == "bare":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(UnsafeFileError, match=r"model\.pt holds pickled code .* never executed.*\.safetensors"):
        load_state_dict(path)
    assert not trap.exists()
    torch.load(path, weights_only=False) if form != "bare" else pickle.loads(path.read_bytes())
    assert trap.exists(), "the trap itself must work, or the test shows nothing"


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_truncated_files_are_refused_by_name(tmp_path: Path, state: StateDict, kind: str) -> None:
    path = tmp_path / ("model.safetensors" if kind == "safetensors" else "model.pt")
    if kind == "safetensors":
        save_state_dict(state, path, {})
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    for length in sorted({0, 1, 7, 8, len(whole) - 1, *random.Random(0).sample(range(len(whole)), 60)}):
        path.write_bytes(whole[:length])
        with pytest.raises(WeightsError, match=path.name):
            load_state_dict(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@given(data=st.data())
@settings(max_examples=150)
def test_damaged_bytes_give_weights_or_a_clear_error(tmp_path_factory: pytest.TempPathFactory, data) -> None:
    """A flipped bit among the values cannot be seen here; the corpus keeps checksums for that."""
    path = tmp_path_factory.getbasetemp() / data.draw(st.sampled_from(["damaged.safetensors", "damaged.pt"]))
    tensors = {"weight": torch.ones(8, 4), "step": torch.tensor(3)}
    if path.suffix == ".pt":
        torch.save(tensors, path, _use_new_zipfile_serialization=data.draw(st.booleans()))
    else:
        save_state_dict(tensors, path, {})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        kinds = {type(tensor) for tensor in load_state_dict(path).values()}
    except WeightsError as error:
        kinds, message = set(), str(error)
    else:
        message = path.name
    assert path.name in message
    assert kinds <= {torch.Tensor}


@pytest.mark.parametrize(
    "content", [{"epoch": 3}, [torch.ones(2)], {"other": {"a": torch.ones(1)}}, {0: torch.ones(1)}]
)
def test_what_holds_no_state_dict_is_refused(tmp_path: Path, content: object) -> None:
    path = tmp_path / "model.pt"
    torch.save(content, path)
    with pytest.raises(WeightsError, match=r"model\.pt holds no state_dict"):
        load_state_dict(path)


def test_missing_and_unknown_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"gone\.pt does not exist"):
        load_state_dict(tmp_path / "gone.pt")
    (tmp_path / "model.xyz").write_bytes(b"x")
    with pytest.raises(WeightsError, match=r"model\.xyz: unknown kind .* \.safetensors"):
        load_state_dict(tmp_path / "model.xyz")


def test_a_full_disk_leaves_the_old_file_and_no_partial_one(tmp_path: Path) -> None:
    """A real limit on the file's size, in a process of its own: the write breaks off as on a full disk."""
    path = tmp_path / "model.safetensors"
    save_state_dict({"weight": torch.zeros(2)}, path, {})
    result = subprocess.run(
        [sys.executable, "-c", _SAVE_UNDER_A_FILE_SIZE_LIMIT, str(path)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 3, result.stderr
    assert "model.safetensors" in result.stdout
    assert "free some disk space" in result.stdout
    assert os.listdir(tmp_path) == ["model.safetensors"]
    assert torch.equal(load_state_dict(path)["weight"], torch.zeros(2))


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(WeightsError, match=r"cannot write .*file/model\.safetensors: .*check the folder"):
        save_state_dict({"a": torch.ones(1)}, tmp_path / "file" / "model.safetensors", {})
