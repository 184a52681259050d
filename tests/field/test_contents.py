"""What a file is and what it holds decides whether it comes in; its name does not."""

from __future__ import annotations

import argparse
import collections
import gzip
import io
import pathlib
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save as safetensors_bytes

from raywgen.corpus import CorpusError
from raywgen.corpus.aside import counts_by_reason
from tests.field.builders import build, ids, net, reasons, same, save

NAMES = {
    "optimizer-adam_lr-0.01.pt": "optimizer-adam_lr-0.01",
    "scheduler-cosine.pth": "scheduler-cosine",
    "scaler_mlp.safetensors": "scaler_mlp",
    "ema.th": "ema",
    "random_states.bin": "random_states",
    "training_args_net.pt": "training_args_net",
    "epoch=3-step=40.ckpt": "epoch=3-step=40",
    "model_best.pth.tar": "model_best",
    "NET.PT": "NET",
    "BEST.PTH.TAR": "BEST",
    "net.model": "net.model",
    "weights": "weights",
    "snapshot.pkl": "snapshot.pkl",
    "net.tar": "net.tar",
    "renamed.pt.gz": "renamed.pt.gz",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_network_comes_in_whatever_its_file_is_called(tmp_path: Path, name: str) -> None:
    save(tmp_path / "in/run" / name, net(3))
    corpus = build(tmp_path, tmp_path / "in")
    assert ids(corpus) == [f"run/{NAMES[name]}"]
    same(corpus, f"run/{NAMES[name]}", net(3))
    assert len(ids(build(tmp_path, tmp_path / "in/run" / name, out="file"))) == 1
    assert len(ids(build(tmp_path, f"{tmp_path}/in/*/*", out="glob"))) == 1


@pytest.mark.parametrize("name", ["net.pt", "net.bin", "net", "net.ckpt"])
def test_safetensors_under_another_name_and_the_other_way_round(tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(safetensors_bytes(net(1)))
    torch.save(net(2), tmp_path / "in/torch.safetensors")
    torch.save(net(3), tmp_path / "in/old.safetensors", _use_new_zipfile_serialization=False)
    corpus = build(tmp_path, tmp_path / "in")
    same(corpus, "net", net(1))
    same(corpus, "torch", net(2))
    same(corpus, "old", net(3))


def zipped(**entries: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.ones(3))
    return buffer.getvalue()


FOREIGN: dict[str, tuple[bytes, str, str]] = {
    "net.gguf": (b"GGUF" + bytes(60), "passed over", "GGUF"),
    "net.h5": (b"\x89HDF\r\n\x1a\n" + bytes(60), "passed over", "HDF5"),
    "net.onnx": (b"\x08\x07\x12\x07pytorch" + bytes(60), "passed over", "ONNX"),
    "flax_model.msgpack": (b"\x82\xa1a\x01" + bytes(60), "passed over", "msgpack"),
    "net.npz": (npz(), "passed over", "NumPy archive"),
    "net.npy": (b"\x93NUMPY\x01\x00" + bytes(60), "passed over", "NumPy array"),
    "net.pt.gz": (gzip.compress(b"x"), "passed over", "gzip"),
    "net.zip": (zipped(a=b"x"), "passed over", "zip archive and no torch file"),
    "__0_0.distcp": (b"PK\x03\x04" + bytes(60), "passed over", "torch.distributed checkpoint"),
    "tree.pickle": (pickle.dumps({"a": 1}), "passed over", "pickle that torch did not write"),
    "named.pt": (b"GGUF" + bytes(60), "passed over", "GGUF"),
    "lfs.safetensors": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
        "refused",
        "git lfs pull",
    ),
    "lfs.bin": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "refused", "Git LFS pointer"),
    "page.pth": (b"<!DOCTYPE html><html></html>", "refused", "web page"),
    "page.safetensors": (b"\n<html></html>" + bytes(60), "refused", "web page"),
    "denied.pt": (b'<?xml version="1.0"?><Error>AccessDenied</Error>', "refused", "fetch it again"),
    "empty.pt": (b"", "refused", "truncated or no torch file"),
    "cut.pt": (zipped(a=b"x" * 99)[:80], "refused", "truncated or damaged"),
    "noise.ckpt": (b"\x11" * 99, "refused", "no torch file"),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_network_is_named_for_what_it_is(tmp_path: Path, name: str) -> None:
    content, kind, message = FOREIGN[name]
    save(tmp_path / "in/good.pt", net(1))
    (tmp_path / "in" / name).write_bytes(content)
    (tmp_path / "in/readme.md").write_text("words")
    corpus = build(tmp_path, tmp_path / "in")
    assert ids(corpus) == ["good"]
    (reason,) = reasons(corpus, kind).values()
    assert message in reason or message in ("no torch file",)
    assert corpus.manifest["recipe"]["others"] == {".md": 1}
    assert counts_by_reason(corpus.quarantine.to_pylist())[0][1] == 1
    if kind == "refused":
        with pytest.raises(CorpusError, match="1 checkpoints were refused"):
            build(tmp_path, tmp_path / "in", out="strict", strict=True)
    else:
        assert ids(build(tmp_path, tmp_path / "in", out="strict", strict=True)) == ["good"]


def test_torchscript_is_named_with_its_remedy(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    torch.jit.save(torch.jit.script(torch.nn.Linear(3, 2)), str(tmp_path / "in/scripted.pt"))
    with pytest.raises(
        CorpusError, match=r"scripted\.pt: is a TorchScript archive.*torch\.jit\.load\(\.\.\.\)\.state_dict"
    ):
        build(tmp_path, tmp_path / "in")


def trained() -> torch.optim.Optimizer:
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return optimizer


class Settings:
    """An object as trainers leave it beside the weights."""

    def __init__(self) -> None:
        self.rate = 0.1


BESIDE: dict[str, Any] = {
    "optimizer.pt": lambda: trained().state_dict(),
    "optimizer.bin": lambda: {"optimizer_state_dict": {"zero_stage": 2, "fp32_flat_groups": [torch.ones(60)]}},
    "optimizer_0.pt": lambda: {"state": {"fc.weight": {"exp_avg": torch.ones(2, 2), "step": torch.ones(())}}},
    "scheduler.pt": lambda: {"last_epoch": 3, "base_lrs": [0.1], "_step_count": 4},
    "scaler.pt": lambda: {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 0},
    "rng_state.pth": lambda: {
        "python": (3, (1, 2), None),
        "numpy": ("MT19937", np.ones(3, np.uint32)),
        "cpu": torch.get_rng_state(),
    },
    "random_states_0.pkl": lambda: {"step": 0, "random_state": (3, (1, 2)), "torch_manual_seed": torch.get_rng_state()},
    "training_args.bin": Settings,
    "rng.pt": torch.get_rng_state,
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_trainers_leave_beside_weights_is_passed_over_by_name(tmp_path: Path, name: str) -> None:
    save(tmp_path / "in/checkpoint-500/model.safetensors", net(1))
    save(tmp_path / "in/checkpoint-500" / name, BESIDE[name]())
    corpus = build(tmp_path, tmp_path / "in", strict=True)
    assert ids(corpus) == ["checkpoint-500/model"]
    assert len(reasons(corpus, "passed over")) == 1


VALUES: dict[str, dict[str, Any]] = {
    "a NumPy scalar": {"epoch": 3, "best": np.float64(0.9)},
    "a namespace with a path": {"args": argparse.Namespace(lr=0.1, out=pathlib.PurePosixPath("runs"))},
    "a NumPy array": {"losses": np.arange(4.0)},
    "a defaultdict": {"log": collections.defaultdict(list, a=[1.0])},
    "an object": {"hyper_parameters": Settings()},
    "an object by an unknown key": {"whatever": Settings()},
    "an optimizer": {"optimizer_states": [trained().state_dict()], "lr_schedulers": [{"last_epoch": 3}]},
    "a random state": {"rng": torch.get_rng_state(), "numpy": np.random.RandomState(0).get_state()},
    "a set, a device and a size": {"seen": {1, 2}, "device": torch.device("cpu"), "size": torch.Size([2])},
}


@pytest.mark.parametrize("zipped_", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", VALUES)
def test_weights_are_taken_from_among_harmless_values(tmp_path: Path, name: str, zipped_: bool) -> None:
    turned = net(2) | {"conv.weight": net(2)["conv.weight"].to(memory_format=torch.channels_last)}
    content = {"state_dict": turned, **VALUES[name]}
    save(tmp_path / "in/net.ckpt", content, _use_new_zipfile_serialization=zipped_)
    same(build(tmp_path, tmp_path / "in", strict=True), "net", net(2))


@pytest.mark.parametrize("order", ["C", "F"])
def test_numpy_arrays_as_weights_and_numbers_among_tensors_are_taken(tmp_path: Path, order: Any) -> None:
    arrays = {name: np.array(tensor.numpy(), order=order) for name, tensor in net(1).items()}
    save(tmp_path / "in/arrays.pt", {**arrays, "big": np.arange(6.0).astype(">f8").reshape(2, 3)})
    save(tmp_path / "in/numbers.pt", {**net(2), "epoch": 3})
    with (tmp_path / "in/plain.bin").open("wb") as file:
        pickle.dump({"model": arrays, "__author__": "x"}, file, protocol=2)
    corpus = build(tmp_path, tmp_path / "in", strict=True)
    same(corpus, "arrays", net(1) | {"big": torch.arange(6.0, dtype=torch.float64).reshape(2, 3)})
    same(corpus, "numbers", net(2))
    same(corpus, "plain", net(1))


def never() -> None:
    raise AssertionError("a pickled function was called")


class Calls:
    def __reduce__(self) -> Any:
        return never, ()


def test_a_refused_call_is_named_with_its_key(tmp_path: Path) -> None:
    save(tmp_path / "in/net.pt", {"model": net(1), "extra": {"hook": Calls()}})
    with pytest.raises(
        CorpusError, match=r"net\.pt: holds pickled code .*under 'extra\.hook' a call of .*never.* never executed"
    ):
        build(tmp_path, tmp_path / "in")


def test_a_whole_pickled_module_is_named_with_its_class(tmp_path: Path) -> None:
    save(tmp_path / "in/net.pt", {"epoch": 3, "model": torch.nn.Linear(3, 2)})
    with pytest.raises(CorpusError, match=r"under 'model' an object of class torch\.nn\.modules\.linear\.Linear"):
        build(tmp_path, tmp_path / "in")


def test_an_entry_among_tensors_that_is_no_tensor_is_named(tmp_path: Path) -> None:
    save(tmp_path / "in/net.pt", {**net(1), "fc._extra_state": io.BytesIO(b"x")})
    with pytest.raises(CorpusError, match=r"fc\._extra_state' .*_io\.BytesIO"):
        build(tmp_path, tmp_path / "in")
