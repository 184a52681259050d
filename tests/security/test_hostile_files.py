"""Files that would hang a reader or fill its memory are refused by kind and size before they are read."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import struct
import threading
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from raywgen.config import ConfigError, load_config
from raywgen.corpus.errors import CorpusError, DamagedFileError
from raywgen.corpus.facts_file import read_facts
from raywgen.corpus.shards import read_block, read_shard
from raywgen.corpus.storage import CorpusStorage
from raywgen.evaluation.report import ReportError, write_report
from raywgen.generators.bundle import BundleError, load_bundle
from raywgen.inputs import UnusableFileError, check_zip, parse_json, read_json, read_regular
from raywgen.locks import only_one
from raywgen.parquet import bounded_table
from raywgen.storage import Storage
from raywgen.tasks.base import TaskError
from raywgen.tasks.encoders import EncoderCard, EncoderError, load_encoder, save_encoder
from raywgen.tasks.images import load_images
from raywgen.tasks.text_datasets import open_tables
from raywgen.tasks.user_data import read_data
from raywgen.tasks.user_sources import ConditionError
from raywgen.training import TrainConfig
from raywgen.training.checkpoints import Checkpoint, CheckpointError
from raywgen.weights import Layout, WeightsError, load_state_dict
from raywgen.zoo.describe import describe_corpus

MIB = 1 << 20


@pytest.fixture(params=["pipe", "socket", "device", "folder"])
def special(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Makes something that is no file under a name; nobody ever writes to the pipe."""
    sockets = []

    def make(name: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if request.param == "pipe":
            os.mkfifo(path)
        elif request.param == "socket":
            sockets.append(socket.socket(socket.AF_UNIX))
            os.symlink(path.parent, link := Path("/tmp") / f"raywgen-test-{os.getpid()}")
            try:  # The name of a socket is short.
                sockets[-1].bind(str(link / path.name))
            finally:
                link.unlink()
        elif request.param == "device":
            path.symlink_to("/dev/zero")
        else:
            path.mkdir()
        return path

    yield make
    for each in sockets:
        each.close()


def soon(call: Callable[[], object]) -> BaseException | None:
    """What a call raises; one that waits for ever fails the test instead of stopping it."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout=20)
    assert not thread.is_alive(), "it waits for a writer"
    return raised[0] if raised else None


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin", ""])
def test_weights_are_regular_files(special: Callable[[str], Path], suffix: str) -> None:
    path = special(f"net{suffix}")
    error = soon(lambda: load_state_dict(path))
    assert isinstance(error, WeightsError)
    assert "not a file" in str(error)


def test_configs_and_recipes_are_regular_files(special: Callable[[str], Path]) -> None:
    path = special("run.yaml")
    assert isinstance(soon(lambda: load_config(TrainConfig, path)), ConfigError)
    assert isinstance(soon(lambda: describe_corpus("nowhere", str(path))), ConfigError)


def test_bundles_and_shards_are_regular_files(special: Callable[[str], Path]) -> None:
    path = special("bundle/generator.json")
    assert isinstance(soon(lambda: load_bundle(path.parent)), BundleError)
    shard = special("weights/one.arrow")
    error = soon(lambda: read_shard(CorpusStorage.at(shard.parents[1]), "weights/one.arrow"))
    assert isinstance(error, DamagedFileError)


def test_encoders_checkpoints_and_logs_are_regular_files(special: Callable[[str], Path]) -> None:
    for name in ("encoder.json", "encoder.safetensors"):
        folder = special(f"{name}.d/{name}").parent
        if name != "encoder.json":
            card = EncoderCard(network={"name": "conv4"}, size=8, channels=1, mean=(0.5,), std=(0.5,))
            save_encoder({"weight": torch.zeros(1)}, card, str(folder / "whole"))
            shutil.copy(folder / "whole" / "encoder.json", folder)
        assert isinstance(soon(partial(load_encoder, str(folder))), EncoderError)
    for name in ("index.json", "progress.json"):
        folder = special(f"checkpoint-{name}.d/{name}").parent
        assert isinstance(soon(partial(Checkpoint.open, Storage.at(folder))), CheckpointError)
    log = special("run/stage/metrics.jsonl")
    (log.parents[1] / "evaluation").mkdir()
    content = {"schema_version": 3, "layouts": [], "rows": [], "ladder": []}
    (log.parents[1] / "evaluation" / "evaluation.json").write_text(json.dumps(content))
    assert not isinstance(soon(lambda: write_report(log.parents[1])), MemoryError)
    assert (log.parents[1] / "report.html").is_file()


def test_a_report_shows_no_file_that_a_link_leads_to(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "evaluation").mkdir(parents=True)
    (tmp_path / "private.yaml").write_text("token: 123456")
    (run / "config.yaml").symlink_to(tmp_path / "private.yaml")
    content = {"schema_version": 3, "layouts": [], "rows": [], "ladder": []}
    (run / "evaluation" / "evaluation.json").write_text(json.dumps(content))
    assert "123456" not in Path(write_report(run)).read_text()
    (run / "config.yaml").unlink()
    (run / "config.yaml").write_text("seed: 123456")
    assert "123456" in Path(write_report(run)).read_text()


def test_a_deeply_nested_evaluation_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "evaluation.json").write_text("[" * 200_000)
    with pytest.raises(ReportError, match=r"evaluation\.json is damaged: it is nested too deeply"):
        write_report(tmp_path)


def test_a_lock_that_is_a_link_empties_nothing(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="run"), only_one(tmp_path / "run"):
        pass
    assert (tmp_path / "precious").read_text() == "kept"


def test_images_and_tables_are_regular_files(special: Callable[[str], Path]) -> None:
    table = special("table.parquet")
    assert isinstance(soon(lambda: open_tables(table)), TaskError)
    picture = special("pictures/class/one.png")
    assert isinstance(soon(lambda: load_images(picture.parents[1])), TaskError)


def test_a_file_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "long").open("wb") as file:
        file.truncate(3 * MIB)
    with pytest.raises(UnusableFileError, match="has 3145728 bytes, and at most 1048576 are read"):
        read_regular(tmp_path / "long", MIB)


def deflated(path: Path, num_bytes: int) -> None:
    """A torch file with one more storage, all zeros and compressed, as no torch file is."""
    torch.save({"weight": torch.zeros(16)}, path)
    with (
        zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as bomb,
        bomb.open("net/data/1", "w", force_zip64=True) as file,
    ):
        for _ in range(num_bytes // MIB):
            file.write(bytes(MIB))


def test_a_deflated_bomb_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    deflated(path, 300 * MIB)
    assert path.stat().st_size < MIB
    with pytest.raises(WeightsError, match=r"net\.pt would unpack to 31\d{7} bytes from a file of \d+"):
        load_state_dict(path)


def test_entries_that_share_bytes_are_refused() -> None:
    entries = [zipfile.ZipInfo(f"{index}") for index in range(3)]
    for entry in entries:
        entry.compress_size = entry.file_size = 100
    with pytest.raises(UnusableFileError, match="claim more bytes than the file has"):
        check_zip(entries, 200, "net.pt")


def test_a_value_that_is_repeated_without_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    torch.save({"weight": torch.zeros(1).expand(1 << 20, 1 << 20)}, path)
    with pytest.raises(WeightsError, match="would unpack to"):
        load_state_dict(path)


def test_names_that_share_one_tensor_take_its_memory_once(tmp_path: Path) -> None:
    """These are ties: half a gibibyte under 512 names, of which the file holds one mebibyte."""
    same = torch.zeros(1 << 18)
    torch.save({f"w{index}": same for index in range(1 << 9)}, tmp_path / "net.pt")
    state = load_state_dict(tmp_path / "net.pt")
    assert len(state) == 1 << 9
    assert len({tensor.data_ptr() for tensor in state.values()}) == 1
    assert Layout.from_state_dict(state).num_bytes == 4 << 18


def test_a_deep_json_and_an_absurd_header_are_refused(tmp_path: Path) -> None:
    deep = "[" * 200_000 + "]" * 200_000
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(deep)
    (tmp_path / "generator.json").write_text(deep)
    with pytest.raises(BundleError, match="nested too deeply"):
        load_bundle(tmp_path)
    for length in (2**63, 2**40, 200 * MIB, len(deep)):
        (tmp_path / "net.safetensors").write_bytes(struct.pack("<Q", length) + deep.encode())
        with pytest.raises(WeightsError, match="no safetensors file"):
            load_state_dict(tmp_path / "net.safetensors")


def test_a_yaml_bomb_is_not_written_out(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    path.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="references that stand for"):
        load_config(TrainConfig, path)
    path.write_text("a: &a [*a]")
    with pytest.raises(ConfigError, match="refers to itself"):
        load_config(TrainConfig, path)
    path.write_text("a: " + "[" * 50_000)
    with pytest.raises(ConfigError, match=r"nested too deeply|nesting depth"):
        load_config(TrainConfig, path)
    path.write_text("seed: &seed 3\nnum_workers: *seed")
    assert load_config(TrainConfig, path).num_workers == 3


def test_a_table_of_repeated_values_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    text = pa.DictionaryArray.from_arrays(pa.array(np.zeros(100_000, np.int32)), ["x" * MIB])
    pq.write_table(pa.table({"text": text}), path, compression="zstd")
    assert path.stat().st_size < MIB
    with pa.memory_map(str(path)) as source, pytest.raises(UnusableFileError, match="would unpack to"):
        bounded_table(source, "table.parquet")


def test_a_table_of_many_constant_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    pq.write_table(pa.table({"label": np.zeros(40_000_000, np.int8)}), path, compression="zstd")
    assert path.stat().st_size < MIB
    with pytest.raises(TaskError, match="would unpack to"):
        open_tables(path)


def test_a_table_of_plain_rows_is_read_whole() -> None:
    table = pa.table({"id": [f"row {n}" for n in range(100_000)], "same": ["x"] * 100_000})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    assert bounded_table(pa.BufferReader(sink.getvalue()), "table").equals(table)
    empty = pa.BufferOutputStream()
    pq.write_table(table.slice(0, 0), empty)
    assert bounded_table(pa.BufferReader(empty.getvalue()), "table").equals(table.slice(0, 0))


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_a_compressed_shard_is_refused_before_it_expands(tmp_path: Path, codec: str) -> None:
    storage = CorpusStorage.at(tmp_path)
    schema = pa.schema([("checkpoint_id", pa.string()), ("packed", pa.large_binary())])
    table = pa.table({"checkpoint_id": ["a"], "packed": pa.array([bytes(64 * MIB)], pa.large_binary())}, schema)
    options = pa.ipc.IpcWriteOptions(compression=codec)
    with pa.OSFile(str(tmp_path / "one.arrow"), "wb") as sink, pa.ipc.new_file(sink, schema, options=options) as writer:
        writer.write_table(table)
    assert (tmp_path / "one.arrow").stat().st_size < MIB
    before = pa.total_allocated_bytes()
    for read in (lambda: read_shard(storage, "one.arrow"), lambda: read_block(storage, "one.arrow", "layout", 0)):
        with pytest.raises(DamagedFileError, match="buffers are compressed"):
            read()
    assert pa.total_allocated_bytes() - before < MIB


def test_damage_to_the_metadata_of_a_shard_never_crashes(tmp_path: Path) -> None:
    storage, path = CorpusStorage.at(tmp_path), tmp_path / "one.arrow"
    schema = pa.schema([("checkpoint_id", pa.string()), ("packed", pa.large_binary())])
    table = pa.table({"checkpoint_id": ["a", "b"], "packed": pa.array([b"1234"] * 2, pa.large_binary())}, schema)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(table)
    whole = path.read_bytes()
    assert read_shard(storage, "one.arrow").equals(table)
    places = np.random.default_rng(0).integers(0, len(whole), 300)
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        try:
            read_shard(storage, "one.arrow")
        except DamagedFileError:
            continue


def picture(width: int, height: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, kind)
    return buffer.getvalue()


def test_an_image_bomb_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "pictures" / "class" / "one.png"
    path.parent.mkdir(parents=True)
    path.write_bytes(picture(9_000, 9_000))
    assert path.stat().st_size < MIB
    with pytest.raises(TaskError, match="9000x9000 pixels from"):
        load_images(path.parents[1], size=8)
    path.write_bytes(picture(1_000, 1_000))
    assert load_images(path.parents[1], size=8).x_SCHW.shape == (1, 1, 8, 8)


def test_postscript_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "pictures" / "class" / "one.png"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with pytest.raises(TaskError, match="damaged image"):
        load_images(path.parents[1])


def test_plain_files_are_still_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"a": [1, {"b": 2}]}))
    assert read_json(tmp_path / "a.json") == {"a": [1, {"b": 2}]}


def test_facts_and_samples_are_regular_files(special: Callable[[str], Path]) -> None:
    for name in ("facts.csv", "facts.json", "facts.parquet"):
        assert isinstance(soon(partial(read_facts, str(special(name)))), CorpusError)
    for name in ("samples.npz", "samples.npy"):
        assert isinstance(soon(partial(read_data, str(special(name)))), ConditionError)


def test_samples_that_claim_more_than_their_file_holds_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as bomb:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (300 * MIB,)})
        with bomb.open("x.npy", "w", force_zip64=True) as file:
            file.write(header.getvalue())
            for _ in range(300):
                file.write(bytes(MIB))
    for shape in ((1 << 40,), (1 << 62, 8)):
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
        (tmp_path / f"claim{len(shape)}.npy").write_bytes(header.getvalue() + bytes(64))
    for name in ("bomb.npz", "claim1.npy", "claim2.npy"):
        with pytest.raises(ConditionError, match=name):
            read_data(str(tmp_path / name))


def test_facts_that_are_nested_without_end_are_refused(tmp_path: Path) -> None:
    (tmp_path / "facts.json").write_text('[{"path": ' + "[" * 100_000)
    with pytest.raises(CorpusError, match="nested too deeply"):
        read_facts(str(tmp_path / "facts.json"))
    (tmp_path / "facts.csv").write_text(f"path,note\na,{'x' * (32 * MIB)}\n")
    with pytest.raises(CorpusError, match=r"facts\.csv cannot be read"):  # One giant cell is no fact.
        read_facts(str(tmp_path / "facts.csv"))
