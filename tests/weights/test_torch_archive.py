"""Torch archives made by hand: what torch never writes is left to torch or refused, and never half believed."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._utils import _rebuild_tensor_v2

from raywgen.weights import UnsafeFileError, WeightsError
from raywgen.weights.inert_pickle import NotPlainError, Opaque, TensorReference, TorchStorage, parse_pickle
from raywgen.weights.packed import PackedCheckpoint
from raywgen.weights.reader import WeightsReader
from raywgen.weights.torch_archive import TorchArchive
from tests.weights.test_layout import assert_bit_equal

FLOATS = torch.arange(12, dtype=torch.float32)


class Stored:
    """Pickles as torch's own reference to a storage."""

    def __init__(self, key: object = "0", num_values: object = 12, kind: object = torch.FloatStorage) -> None:
        self.pid = ("storage", kind, key, "cpu", num_values)


class Rebuilt:
    """Pickles as torch's own call that makes a tensor of a storage."""

    def __init__(
        self,
        shape: object = (3, 4),
        stride: object = (4, 1),
        offset: object = 0,
        storage: object = None,
        marks: tuple[object, ...] = (),
        attributes: object = None,
    ) -> None:
        self.arguments = (storage or Stored(), offset, shape, stride, False, OrderedDict(), *marks)
        self.attributes = attributes

    def __reduce__(self) -> tuple[object, ...]:
        call = (_rebuild_tensor_v2, self.arguments)
        return call if self.attributes is None else (*call, self.attributes)


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: object) -> object:
        return obj.pid if isinstance(obj, Stored) else None


def pickled(content: object) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(content)
    return buffer.getvalue()


def write_archive(
    path: Path, data: bytes, storages: Mapping[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED
) -> Path:
    entries = {"data.pkl": data, "byteorder": b"little", "version": b"3\n"}
    stored = {"0": FLOATS.numpy().tobytes()} if storages is None else storages
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in {**entries, **{f"data/{key}": raw for key, raw in stored.items()}}.items():
            archive.writestr(f"model/{name}", content)
    return path


def unpacked(checkpoint: PackedCheckpoint) -> dict[str, torch.Tensor]:
    return checkpoint.layout.unpack(torch.from_numpy(checkpoint.packed_P))


@pytest.fixture
def torch_load_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("torch.load was called")

    monkeypatch.setattr(torch, "load", refuse)


@pytest.mark.usefixtures("torch_load_is_not_needed")
def test_an_archive_made_by_hand_is_read_without_torch(tmp_path: Path) -> None:
    content = {
        "a": Rebuilt(),
        "b": Rebuilt((2,), (1,), 5),
        "one": Rebuilt((1, 2), (99, 1), 10),
        "none": Rebuilt((0, 4)),
    }
    path = write_archive(tmp_path / "model.pt", pickled(content))
    expected = {
        "a": FLOATS.reshape(3, 4),
        "b": FLOATS[5:7],
        "one": FLOATS[10:].reshape(1, 2),
        "none": torch.zeros(0, 4),
    }
    assert_bit_equal(unpacked(WeightsReader().read(path)), expected)


@pytest.mark.usefixtures("torch_load_is_not_needed")
def test_a_module_with_parameters_buffers_and_metadata_is_read_without_torch(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    state = module.state_dict()
    assert hasattr(state, "_metadata")
    torch.save(OrderedDict(module.named_parameters()), tmp_path / "parameters.pt")
    torch.save(state, tmp_path / "state.pt")
    parameters = {name: tensor.detach() for name, tensor in module.named_parameters()}
    assert_bit_equal(unpacked(WeightsReader().read(tmp_path / "parameters.pt")), parameters)
    assert_bit_equal(unpacked(WeightsReader().read(tmp_path / "state.pt")), dict(state))


@pytest.mark.parametrize(
    "tensor",
    [
        Rebuilt((3, 4), (1, 3)),
        Rebuilt((4,), (0,)),
        Rebuilt((2, 2), (4, 1), 1),
        Rebuilt((3, 4), (4, 1), 0, marks=({"neg": True},)),
    ],
    ids=["transposed", "expanded", "sliced", "negated"],
)
def test_what_is_not_contiguous_is_read_with_the_values_that_torch_reads(tmp_path: Path, tensor: Rebuilt) -> None:
    path = write_archive(tmp_path / "model.pt", pickled({"a": tensor}))
    expected = torch.load(path, weights_only=True)["a"].resolve_neg()
    assert torch.equal(unpacked(WeightsReader().read(path))["a"], expected)


HOSTILE = {
    "beyond the storage": {"a": Rebuilt((13,), (1,))},
    "offset beyond the storage": {"a": Rebuilt((12,), (1,), 1)},
    "negative offset": {"a": Rebuilt((2,), (1,), -2)},
    "negative length": {"a": Rebuilt((-1,), (1,))},
    "offset no integer": {"a": Rebuilt((2,), (1,), 0.0)},
    "length no integer": {"a": Rebuilt((2.0,), (1,))},
    "shape a text": {"a": Rebuilt("ab", "cd")},
    "strides of another number": {"a": Rebuilt((3, 4), (1,))},
    "storage a number": {"a": Rebuilt(storage=3)},
    "size no integer": {"a": Rebuilt(storage=Stored(num_values=12.0))},
    "key a number": {"a": Rebuilt(storage=Stored(key=0))},
    "kind a class of another sort": {"a": Rebuilt(storage=Stored(kind=OrderedDict))},
    "attributes that move the offset": {"a": Rebuilt((2,), (1,), attributes=(None, {"offset": -100}))},
    "attributes as a list": {"a": Rebuilt((2,), (1,), attributes=[Stored(), -8, (10**6,)])},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_references_that_torch_would_not_write_are_not_plain(name: str) -> None:
    with pytest.raises(NotPlainError):
        parse_pickle(pickled(HOSTILE[name]))


@pytest.mark.parametrize("name", HOSTILE)
def test_archives_with_such_references_end_in_an_error_that_names_the_file(tmp_path: Path, name: str) -> None:
    path = write_archive(tmp_path / "model.pt", pickled(HOSTILE[name]))
    try:
        checkpoint = WeightsReader().read(path)
    except WeightsError as error:
        message = str(error)
    else:
        message = path.name
        assert torch.equal(unpacked(checkpoint)["a"], torch.load(path, weights_only=True)["a"])
    assert path.name in message


def test_a_pickle_cannot_change_what_rebuilds_its_tensors() -> None:
    defaults = (None, {"__defaults__": (1, 2, 3)})
    data = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n" + pickled(defaults)[2:-1] + b"b."
    with pytest.raises(NotPlainError):
        parse_pickle(data)
    assert isinstance(parse_pickle(pickled({"a": Rebuilt()})).content["a"], TensorReference)


@pytest.mark.usefixtures("torch_load_is_not_needed")
@pytest.mark.parametrize("attribute", ["items", "get", "keys", "values"])
def test_attributes_hung_on_a_state_dict_do_not_reach_the_reader(tmp_path: Path, attribute: str) -> None:
    text = pickled({attribute: 3})[2:-1]
    names = pickled(OrderedDict())[2:-1]
    hung = b"\x80\x02}X\x05\x00\x00\x00model" + names + b"X\x01\x00\x00\x00a" + pickled(Rebuilt())[2:-1] + b"s"
    path = write_archive(tmp_path / "model.pt", hung + text + b"bs.")
    assert torch.equal(unpacked(WeightsReader().read(path))["a"], FLOATS.reshape(3, 4))


@pytest.mark.parametrize("index", [2**31, 2**32 - 1])
def test_a_number_in_the_pickle_does_not_ask_for_all_memory(index: int) -> None:
    data = b"\x80\x02}r" + struct.pack("<I", index) + b"."
    assert parse_pickle(data).content == {}


@pytest.mark.parametrize("num_values", [2**40, 2**62, 10**30, -12])
def test_a_storage_that_claims_more_than_it_has_is_refused_before_memory_is_taken(
    tmp_path: Path, num_values: int
) -> None:
    shape = (max(num_values, 0),)
    path = write_archive(tmp_path / "model.pt", pickled({"a": Rebuilt(shape, (1,), storage=Stored("0", num_values))}))
    with pytest.raises(WeightsError, match=r"(?s)model\.pt.*(fetch it again|save the state_dict alone)"):
        WeightsReader().read(path)


def test_a_storage_named_with_two_sizes_gives_no_stray_bytes(tmp_path: Path) -> None:
    content = {"a": Rebuilt((12,), (1,)), "b": Rebuilt((2,), (1,), storage=Stored("0", 2))}
    path = write_archive(tmp_path / "model.pt", pickled(content))
    assert_bit_equal(unpacked(WeightsReader().read(path)), {"a": FLOATS, "b": FLOATS[:2]})


@pytest.mark.parametrize("size", [0, 47, 49])
def test_a_storage_of_another_length_is_refused(tmp_path: Path, size: int) -> None:
    path = write_archive(tmp_path / "model.pt", pickled({"a": Rebuilt()}), {"0": bytes(size)})
    with pytest.raises(WeightsError, match=r"model\.pt is damaged: storage 0 does not have 48 bytes; fetch it again"):
        WeightsReader().read(path)


def test_a_missing_storage_is_refused(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "model.pt", pickled({"a": Rebuilt()}), {"1": bytes(48)})
    with pytest.raises(WeightsError, match=r"model\.pt is damaged: storage 0 .*fetch it again"):
        WeightsReader().read(path)


@pytest.mark.parametrize("dtype", ["float32", "float8_e4m3fn"])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_flipped_byte_of_the_values_is_found(tmp_path: Path, dtype: str, transposed: bool) -> None:
    """Also where torch reads the file: torch itself ignores the checksums."""
    tensor = torch.linspace(1, 2, 6).reshape(2, 3).to(getattr(torch, dtype))
    path = tmp_path / "model.pt"
    torch.save({"a": tensor.t() if transposed else tensor}, path)
    raw = tensor.view(torch.uint8).numpy().tobytes()
    whole = path.read_bytes()
    assert whole.count(raw) == 1
    for place in range(whole.index(raw), whole.index(raw) + len(raw)):
        content = bytearray(whole)
        content[place] ^= 1
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=r"model\.pt is truncated or damaged at '.*data/0'; fetch it again"):
            WeightsReader().read(path)


def test_a_damaged_pickle_is_distinguished_from_a_hostile_one(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"some_name": torch.ones(2)}, path)
    path.write_bytes(path.read_bytes().replace(b"some_name", b"same_name", 1))
    with pytest.raises(
        WeightsError, match=r"model\.pt is truncated or damaged at 'data\.pkl'; fetch it again"
    ) as error:
        WeightsReader().read(path)
    assert not isinstance(error.value, UnsafeFileError)


def central_record(content: bytes | bytearray, name: bytes) -> int:
    start = content.index(b"PK\x01\x02")
    return content.rindex(b"PK\x01\x02", start, content.index(name, start))


@pytest.mark.parametrize("offset", [1, 10**6, 2**32 - 2])
def test_an_entry_said_to_lie_elsewhere_is_refused(tmp_path: Path, offset: int) -> None:
    path = write_archive(tmp_path / "model.pt", pickled({"a": Rebuilt()}))
    content = bytearray(path.read_bytes())
    place = central_record(content, b"model/data/0") + 42
    content[place : place + 4] = struct.pack("<I", offset)
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"model\.pt is truncated or damaged at 'data/0'; fetch it again"):
        WeightsReader().read(path)


@pytest.mark.parametrize("offset", [2**63 - 1, 2**63, 2**64 - 1])
def test_an_entry_said_to_lie_beyond_any_file_is_refused(tmp_path: Path, offset: int) -> None:
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data/0", FLOATS.numpy().tobytes())
        archive.writestr("model/data.pkl", pickled({"a": Rebuilt()}))
        archive.filelist[0].header_offset = offset
    with pytest.raises(WeightsError, match=r"model\.pt is truncated or damaged.*fetch it again"):
        WeightsReader().read(path)


def test_an_entry_that_claims_more_bytes_than_the_file_is_refused(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "model.pt", pickled({"a": Rebuilt()}))
    content = bytearray(path.read_bytes())
    place = central_record(content, b"model/data.pkl") + 24
    content[place : place + 4] = struct.pack("<I", 2**20)
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"model\.pt is damaged: 'data\.pkl' claims more bytes .*fetch it again"):
        WeightsReader().read(path)


def test_a_compressed_archive_and_one_without_a_pickle_are_not_plain(tmp_path: Path) -> None:
    compressed = write_archive(tmp_path / "a.pt", pickled({"a": Rebuilt()}), compression=zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:
        archive.writestr("readme.txt", "nothing")
    for path, reason in ((compressed, "compressed"), (tmp_path / "b.pt", r"no data\.pkl")):
        with path.open("rb") as file, pytest.raises(NotPlainError, match=reason):
            TorchArchive(file, str(path))
    with pytest.raises(WeightsError, match=r"b\.pt is a zip archive and no torch file; unpack it"):
        WeightsReader().read(tmp_path / "b.pt")


def test_an_archive_that_names_an_entry_twice_is_not_left_to_torch(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", pickled({"a": Rebuilt(marks=({"neg": True},))}))
        archive.writestr("model/data/0", bytes(48))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("model/data/0", FLOATS.numpy().tobytes())
    with pytest.raises(WeightsError, match=r"model\.pt is truncated or damaged at 'model/data/0'; fetch it again"):
        WeightsReader().read(path)


def test_an_entry_marked_as_a_folder_is_not_left_to_torch(tmp_path: Path) -> None:
    """torch would read it as zeros."""
    path = write_archive(tmp_path / "model.pt", pickled({"a": Rebuilt(marks=({"neg": True},))}))
    content = bytearray(path.read_bytes())
    content[central_record(content, b"model/data/0") + 38] |= 0x10
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"model\.pt is truncated or damaged at 'model/data/0'; fetch it again"):
        WeightsReader().read(path)


def test_big_endian_values_are_turned_around(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", pickled({"a": Rebuilt((12,), (1,))}))
        archive.writestr("model/byteorder", b"big")
        archive.writestr("model/data/0", FLOATS.numpy().astype(">f4").tobytes())
        archive.writestr("model/version", b"3\n")
    assert_bit_equal(unpacked(WeightsReader().read(path)), {"a": FLOATS})


def test_a_reference_counts_its_bytes() -> None:
    reference = TensorReference(TorchStorage("0", "float64", 100), 3, (2, 5))
    assert reference.byte_range == (24, 80)
    assert reference.dtype == torch.float64
    assert reference.storage.num_bytes == 800


@pytest.mark.parametrize("module_and_name", ["posix system", "builtins eval", "torch load", "collections deque"])
def test_no_other_name_is_looked_up(module_and_name: str) -> None:
    module, name = module_and_name.split()
    found = parse_pickle(f"c{module}\n{name}\n.".encode())
    assert (found.content.name, found.calls) == (f"{module}.{name}", [])
    called = parse_pickle(f"c{module}\n{name}\n)R.".encode())
    assert (type(called.content), called.content.name) == (Opaque, f"{module}.{name}")
    assert called.calls == ([] if module == "collections" else [f"{module}.{name}"])


def test_noise_is_never_a_plain_pickle() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        found: Any = None
        try:
            found = parse_pickle(rng.bytes(int(rng.integers(0, 60))))
        except NotPlainError:
            continue
        assert not isinstance(found, TensorReference)
