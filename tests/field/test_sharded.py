"""Networks in several files: the index is followed for every tensor, and parts never enter as networks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from raywgen.corpus import CorpusError
from tests.field.builders import build, ids, net, reasons, same, save

Parts = dict[str, dict[str, Tensor]]


def parts(state: dict[str, Tensor], name: str) -> Parts:
    half = len(state) // 2
    return {
        name.format(1): dict(list(state.items())[:half]),
        name.format(2): dict(list(state.items())[half:]),
    }


def write(folder: Path, files: Parts, index: str, weight_map: dict[str, str] | None = None) -> None:
    for name, part in files.items():
        save(folder / name, part)
    listed = {key: name for name, part in files.items() for key in part} if weight_map is None else weight_map
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": listed}))


@pytest.mark.parametrize(
    ("index", "name", "expected"),
    [
        ("model.safetensors.index.json", "model-{:05d}-of-00002.safetensors", "m/model"),
        ("model.safetensors.index.fp16.json", "model.fp16-{:05d}-of-00002.safetensors", "m/model.fp16"),
        ("model.fp16.safetensors.index.json", "model.fp16-{:05d}-of-00002.safetensors", "m/model.fp16"),
        ("pytorch_model.bin.index.json", "pytorch_model-{:05d}-of-00002.bin", "m/pytorch_model"),
        ("model.safetensors.index.json", "anything{}.safetensors", "m/model"),
    ],
)
def test_a_sharded_network_is_one(tmp_path: Path, index: str, name: str, expected: str) -> None:
    write(tmp_path / "in/m", parts(net(1), name), index)
    corpus = build(tmp_path, tmp_path / "in")
    assert ids(corpus) == [expected]
    same(corpus, expected, net(1))
    assert reasons(corpus) == {}
    assert len(ids(build(tmp_path, tmp_path / "in/m" / index, out="file"))) == 1
    assert len(ids(build(tmp_path, f"{tmp_path}/in/*/*.{name.rpartition('.')[2]}", out="glob"))) == 1


def test_variants_formats_and_a_whole_file_beside_each_other_keep_their_names(tmp_path: Path) -> None:
    write(tmp_path / "in", parts(net(1), "model-{}-of-2.safetensors"), "model.safetensors.index.json")
    write(tmp_path / "in", parts(net(2), "model.fp16-{}-of-2.safetensors"), "model.safetensors.index.fp16.json")
    write(tmp_path / "in", parts(net(3), "pytorch_model-{}-of-2.bin"), "pytorch_model.bin.index.json")
    save(tmp_path / "in/model.safetensors", net(4))
    save(tmp_path / "in/model.fp16.safetensors", net(5))
    corpus = build(tmp_path, tmp_path / "in")
    expected = {
        "model.safetensors.index.json": 1,
        "model.safetensors.index.fp16.json": 2,
        "pytorch_model": 3,
        "model.safetensors": 4,
        "model.fp16.safetensors": 5,
    }
    assert ids(corpus) == sorted(expected)
    for name, seed in expected.items():
        same(corpus, name, net(seed))


def lacks_a_file(folder: Path, files: Parts) -> None:
    write(folder, files, "model.safetensors.index.json")
    (folder / list(files)[1]).unlink()


def lacks_a_tensor(folder: Path, files: Parts) -> None:
    listed = {key: name for name, part in files.items() for key in part} | {"gone.weight": list(files)[1]}
    write(folder, files, "model.safetensors.index.json", listed)


def has_a_tensor_twice(folder: Path, files: Parts) -> None:
    first, second = files.values()
    listed = {key: name for name, part in files.items() for key in part}
    write(
        folder,
        dict(zip(files, (first, second | {"conv.weight": torch.zeros(4)}), strict=True)),
        "model.safetensors.index.json",
        listed,
    )


def has_one_more_tensor(folder: Path, files: Parts) -> None:
    listed = {key: name for name, part in files.items() for key in part if key != "fc.bias"}
    write(folder, files, "model.safetensors.index.json", listed)


def has_tensors_exchanged(folder: Path, files: Parts) -> None:
    one, two = files
    listed = {key: two if name == one else one for name, part in files.items() for key in part}
    write(folder, files, "model.safetensors.index.json", listed)


def leads_outside(folder: Path, files: Parts) -> None:
    save(folder.parent / "other/net.safetensors", net(3))
    listed = {key: name for name, part in files.items() for key in part} | {"fc.bias": "../other/net.safetensors"}
    write(folder, files, "model.safetensors.index.json", listed)


def is_no_json(folder: Path, files: Parts) -> None:
    write(folder, files, "model.safetensors.index.json")
    (folder / "model.safetensors.index.json").write_text("<html>")


def is_empty(folder: Path, files: Parts) -> None:
    write(folder, files, "model.safetensors.index.json")
    (folder / "model.safetensors.index.json").write_bytes(b"")


BAD: list[tuple[Callable[[Path, Parts], None], str]] = [
    (lacks_a_file, "model-00002-of-00002.safetensors is missing"),
    (lacks_a_tensor, "lacks tensor 'gone.weight'"),
    (has_a_tensor_twice, "holds tensor 'conv.weight', which .* places in another file"),
    (has_one_more_tensor, "holds tensor 'fc.bias', which .* places nowhere"),
    (has_tensors_exchanged, "lacks tensor"),
    (leads_outside, "is no index"),
    (is_no_json, "is no index"),
    (is_empty, "is no index"),
]


@pytest.mark.parametrize(("spoil", "reason"), BAD, ids=lambda value: getattr(value, "__name__", ""))
def test_a_bad_index_costs_its_own_network_and_no_other(
    tmp_path: Path, spoil: Callable[[Path, Parts], None], reason: str
) -> None:
    save(tmp_path / "in/good/model.safetensors", net(0))
    spoil(tmp_path / "in/bad", parts(net(1), "model-{:05d}-of-00002.safetensors"))
    corpus = build(tmp_path, tmp_path / "in")
    assert [name for name in ids(corpus) if not name.startswith("other")] == ["good/model"]
    assert list(reasons(corpus)) == ["bad/model"]
    with pytest.raises(CorpusError, match=f"1 checkpoints were refused.*{reason}"):
        build(tmp_path, tmp_path / "in", out="strict", strict=True)


@pytest.mark.parametrize(
    "files",
    [
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        ["model-00001-of-00002.safetensors"],
        ["mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"],
        ["iter_10/mp_rank_00/model_optim_rng.pt", "iter_10/mp_rank_01/model_optim_rng.pt"],
        ["consolidated.00.pth", "consolidated.01.pth"],
        ["layer_00-model_states.pt", "layer_01-model_00-model_states.pt"],
    ],
    ids=lambda files: files[0],
)
def test_parts_without_an_index_are_refused_as_parts(tmp_path: Path, files: list[str]) -> None:
    for seed, name in enumerate(files):
        save(tmp_path / "in/split" / name, net(seed))
    save(tmp_path / "in/whole.pt", net(9))
    corpus = build(tmp_path, tmp_path / "in")
    assert ids(corpus) == ["whole"]
    refusals = reasons(corpus, "refused")
    assert len(refusals) == len(files)
    assert all("part" in reason or "one layer of a network" in reason for reason in refusals.values())
    if "/" not in files[0]:
        with pytest.raises(CorpusError, match="none of the 1 checkpoints"):
            build(tmp_path, tmp_path / "in/split" / files[0], out="alone")


@pytest.mark.parametrize(
    "name", ["model-00001-of-00001.safetensors", "consolidated.00.pth", "mp_rank_00_model_states.pt"]
)
def test_the_only_part_is_the_network(tmp_path: Path, name: str) -> None:
    save(tmp_path / "in" / name, net())
    assert len(ids(build(tmp_path, tmp_path / "in"))) == 1
