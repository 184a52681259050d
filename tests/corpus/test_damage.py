"""Damaged, missing and unfit files are refused by name, and `verify_corpus` finds them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from raywgen.corpus import (
    ChangedCorpusError,
    Corpus,
    CorpusError,
    DamagedFileError,
    MissingFileError,
    UnknownFactError,
    packed_tensor,
    verify_corpus,
    write_shard,
)
from raywgen.corpus.checksums import RowCheck
from raywgen.corpus.chunk_stream import ChunkStream
from raywgen.corpus.describe import describe
from raywgen.corpus.shards import read_shard
from raywgen.corpus.storage import CorpusStorage
from raywgen.weights import Layout, NonFiniteWeightsError
from tests.corpus import builders


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    builders.small_corpus(root)
    return root


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "corpus"))


def flip_weight(path: Path, packed: torch.Tensor, byte: int = 4) -> None:
    """Flips one bit inside the stored bytes of one checkpoint."""
    content = bytearray(path.read_bytes())
    place = content.find(packed.numpy().tobytes())
    assert place >= 0
    content[place + byte] ^= 1
    path.write_bytes(content)


def edit_manifest(root: Path, edit: Callable[[dict], object]) -> None:
    manifest = json.loads((root / "manifest.json").read_text())
    edit(manifest)
    (root / "manifest.json").write_text(json.dumps(manifest))


def test_an_unharmed_corpus_verifies(root: Path) -> None:
    assert verify_corpus(root) == []


def test_missing_shard(root: Path) -> None:
    (root / "weights/c-held.arrow").unlink()
    with pytest.raises(MissingFileError, match=r"weights/c-held\.arrow is missing; restore it or build"):
        Corpus.open(root)
    (damage,) = verify_corpus(root)
    assert damage.file == "weights/c-held.arrow"
    assert damage.checkpoint_ids == ("held0", "held1", "held2", "held3")


@pytest.mark.parametrize("num_lost", [1, 100, 10**9])
def test_truncated_shard(root: Path, num_lost: int) -> None:
    path = root / "weights/b-wide.arrow"
    path.write_bytes(path.read_bytes()[:-num_lost])
    with pytest.raises(DamagedFileError, match=r"weights/b-wide\.arrow has \d+ bytes, the manifest says \d+; restore"):
        Corpus.open(root)
    (damage,) = verify_corpus(root)
    assert (damage.file, damage.checkpoint_ids) == ("weights/b-wide.arrow", ("wide0", "wide1", "wide2"))


def test_shard_truncated_after_open(root: Path) -> None:
    corpus = Corpus.open(root)
    path = root / "weights/b-wide.arrow"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DamagedFileError, match=r"weights/b-wide\.arrow is truncated"):
        corpus.state_dict("wide1")


def test_flipped_byte_is_found_and_named_with_its_checkpoint(root: Path) -> None:
    state = builders.network(2, 550)
    layout = Layout.from_state_dict(state)
    flip_weight(root / "weights/a-narrow.arrow", layout.pack(state))
    corpus = Corpus.open(root)
    (damage,) = verify_corpus(root)
    assert (damage.file, damage.checkpoint_ids) == ("weights/a-narrow.arrow", ("narrow550",))
    with pytest.raises(DamagedFileError, match=r"narrow550.*restore"):
        corpus.state_dict("narrow550")
    builders.assert_same_bits(corpus.state_dict("narrow549"), builders.network(2, 549))


READERS: dict[str, Callable[[Corpus], object]] = {
    "packed": lambda corpus: corpus.packed(corpus.select(split="heldout")),
    "values": lambda corpus: corpus.values(corpus.select(split="heldout")),
    "checkpoints": lambda corpus: list(corpus.checkpoints(["split=heldout"])),
    "stream": lambda corpus: list(chunks(corpus).epoch()),
    "stream that reads ahead": lambda corpus: list(chunks(corpus, prefetch=2).epoch()),
    "stream of ragged chunks": lambda corpus: list(chunks(corpus, chunk_length=5).epoch()),
    "blocks": lambda corpus: [corpus.checked_block(block) for block in corpus.blocks(["heldout"])],
}


def chunks(corpus: Corpus, *, chunk_length: int = 8, prefetch: int = 0) -> ChunkStream:
    return corpus.stream(chunk_length=chunk_length, batch_size=4, terms=["split=heldout"], prefetch=prefetch)


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_no_reader_uses_a_flipped_weight(root: Path, read: Callable[[Corpus], object]) -> None:
    read(Corpus.open(root))
    state = builders.network(2, 2002)
    flip_weight(root / "weights/c-held.arrow", Layout.from_state_dict(state).pack(state))
    with pytest.raises(DamagedFileError, match=r"weights.*: checkpoint 'held2' has another checksum.*restore it"):
        read(Corpus.open(root))


def test_checkpoints_are_compared_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, compared = Corpus.open(root), []
    compare = RowCheck.compare
    monkeypatch.setattr(
        RowCheck, "compare", lambda self, rows, *more: (compared.extend(rows), compare(self, rows, *more))
    )
    for _ in range(2):
        list(chunks(corpus).epoch())
        corpus.state_dict("held1")
    assert sorted(compared) == [0, 1, 2, 3]


def test_a_corpus_that_is_deleted_while_it_is_read_says_so(root: Path) -> None:
    corpus = Corpus.open(root)
    shutil.rmtree(root)
    with pytest.raises(ChangedCorpusError, match=rf"{root} was deleted, or is being rebuilt, while it was read; run"):
        list(chunks(corpus).epoch())


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_corpus_that_is_rebuilt_while_it_is_read_says_so(root: Path, read: Callable[[Corpus], object]) -> None:
    corpus = Corpus.open(root)
    shutil.rmtree(root)
    held = builders.states("held", 4, 2, 7000)
    shards = [builders.shard(root, "c-held", held, split="heldout")]
    builders.commit(root, shards, [Layout.from_state_dict(held["held0"])])
    with pytest.raises(ChangedCorpusError, match=rf"{root} was rebuilt while it was read; run the same command again"):
        read(corpus)


def test_processes_of_one_run_read_one_corpus(root: Path) -> None:
    snapshot = Corpus.open(root).snapshot
    assert Corpus.open(root, snapshot).snapshot == snapshot
    describe(root, [replace(builders.task(), instruction="Is it not?")], {})
    with pytest.raises(ChangedCorpusError, match="was rebuilt while it was read; run the same command again"):
        Corpus.open(root, snapshot)


def test_a_shard_that_is_open_is_read_on_after_it_was_deleted(root: Path) -> None:
    corpus = Corpus.open(root)
    expected = corpus.packed(corpus.select(split="heldout"))
    shutil.rmtree(root)
    assert torch.equal(corpus.packed(corpus.select(split="heldout")), expected)


def test_every_flipped_byte_is_found_and_none_crashes_a_reader(root: Path) -> None:
    """Offsets, ids and Arrow's own headers too: reading ends in a CorpusError or in intact weights."""
    path = root / "weights/b-wide.arrow"
    whole = path.read_bytes()
    intact = {f"wide{i}": builders.network(5, 1000 + i) for i in range(3)}
    refusals: list[str] = []
    masks = np.random.default_rng(0).integers(1, 256, len(whole), dtype=np.uint8)
    for place, mask in enumerate(masks):
        content = bytearray(whole)
        content[place] ^= int(mask)
        path.write_bytes(content)
        assert [damage.file for damage in verify_corpus(root)] == ["weights/b-wide.arrow"], place
        corpus = Corpus.open(root)
        for checkpoint_id, state in intact.items():
            try:
                found = corpus.state_dict(checkpoint_id)
            except CorpusError as error:
                refusals.append(str(error))
            else:
                builders.assert_same_bits(found, state)
    assert len(refusals) > 100
    assert all("weights/b-wide.arrow" in message for message in refusals)


@pytest.mark.parametrize("name", ["checkpoints.parquet", "tasks.parquet"])
def test_tampered_facts(root: Path, name: str) -> None:
    table = pq.read_table(root / name)
    changed = pa.array(["unseen"] * table.num_rows)
    pq.write_table(table.set_column(table.column_names.index("split"), "split", changed), root / name)
    with pytest.raises(DamagedFileError, match=rf"{name} has another checksum"):
        Corpus.open(root)
    assert name in [damage.file for damage in verify_corpus(root)]


@pytest.mark.parametrize("name", ["checkpoints.parquet", "tasks.parquet"])
def test_missing_facts(root: Path, name: str) -> None:
    (root / name).unlink()
    with pytest.raises(MissingFileError, match=rf"{name} is missing"):
        Corpus.open(root)
    assert [damage.file for damage in verify_corpus(root)] == [name]


def test_missing_manifest(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"manifest\.json.*no corpus"):
        Corpus.open(tmp_path)


def test_other_schema_version(root: Path) -> None:
    edit_manifest(root, lambda manifest: manifest.update(schema_version=99))
    with pytest.raises(CorpusError, match="corpus schema 99, this version reads 2; use the version"):
        Corpus.open(root)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'"text"', b"\xff\xfe", b'{"schema_version": 1}', b"null"], ids=repr
)
def test_manifest_that_is_no_manifest(root: Path, content: bytes) -> None:
    (root / "manifest.json").write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"manifest\.json.*restore it or build"):
        Corpus.open(root)


@pytest.mark.parametrize(
    "edit",
    [
        lambda manifest: manifest["shards"][0].pop("sha256"),
        lambda manifest: manifest["shards"][0].update(surprise=1),
        lambda manifest: manifest["networks"][0].pop("layout"),
        lambda manifest: manifest["networks"][0]["layout"][0].pop("shape"),
        lambda manifest: manifest.update(shards=None),
        lambda manifest: manifest.update(sha256={}),
        lambda manifest: manifest["networks"].pop(0),
    ],
    ids=["no sum", "unknown key", "no layout", "no shape", "no shards", "no sums", "no network"],
)
def test_manifest_with_a_damaged_entry(root: Path, edit: Callable[[dict], object]) -> None:
    edit_manifest(root, edit)
    with pytest.raises(DamagedFileError, match=r"manifest\.json.*restore it or build"):
        Corpus.open(root)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_checkpoint_that_is_not_finite_is_refused(tmp_path: Path, value: float) -> None:
    states = builders.states("net", 3, 2, 0)
    states["net1"]["0.bias"][1] = value
    with pytest.raises(NonFiniteWeightsError, match=r"net1.*'0\.bias' holds NaN or infinity; drop this"):
        builders.shard(tmp_path, "bad", states)
    assert list(tmp_path.rglob("*.*")) == []


def test_packed_weights_of_another_length_are_refused(tmp_path: Path) -> None:
    layout = Layout.from_state_dict(builders.network(2, 0))
    packed_NP = torch.zeros(1, layout.num_bytes + 8, dtype=torch.uint8)
    with pytest.raises(CorpusError, match=r"shard long: packed weights .* pack every checkpoint by this layout"):
        write_shard(str(tmp_path), "long", layout, [builders.facts("net", layout)], packed_NP)
    assert list(tmp_path.rglob("*.*")) == []


def test_one_shard_holds_one_split(tmp_path: Path) -> None:
    layout = Layout.from_state_dict(builders.network(2, 0))
    rows = [builders.facts("a", layout), builders.facts("b", layout, split="unseen")]
    with pytest.raises(CorpusError, match=r"shard mixed: .*train.*unseen"):
        write_shard(str(tmp_path), "mixed", layout, rows, torch.zeros(2, layout.num_bytes, dtype=torch.uint8))


def test_a_block_of_another_layout_is_refused(root: Path) -> None:
    other = Layout.from_state_dict(builders.network(5, 0))
    with pytest.raises(CorpusError, match=f"{other.num_bytes} bytes"):
        packed_tensor(read_shard(CorpusStorage.at(root), "weights/c-held.arrow"), other)


def test_values_of_nothing_or_of_mixed_layouts_are_refused(root: Path) -> None:
    corpus = Corpus.open(root)
    with pytest.raises(CorpusError, match="no checkpoint is selected"):
        corpus.values(corpus.select(split="unseen"))
    with pytest.raises(CorpusError, match=r"2 layouts.*layout_id"):
        corpus.values(corpus.select(split="train"))


def test_one_checkpoint_id_twice_is_refused(tmp_path: Path) -> None:
    states = builders.states("net", 1, 2, 0)
    shards = [builders.shard(tmp_path, "a", states), builders.shard(tmp_path, "b", states)]
    with pytest.raises(CorpusError, match="'net0' is there twice"):
        builders.commit(tmp_path, shards, [Layout.from_state_dict(states["net0"])])


def test_unknown_names_are_key_errors_with_a_remedy(root: Path) -> None:
    corpus = Corpus.open(root)
    with pytest.raises(UnknownFactError, match="unknown fact 'spilt'; did you mean 'split'"):
        corpus.select(spilt="train")
    with pytest.raises(KeyError, match="no checkpoint 'narrow9999'"):
        corpus.state_dict("narrow9999")


def test_unknown_kind_of_uri() -> None:
    with pytest.raises(CorpusError, match=r"floppy://a.*give a local path or a URI"):
        Corpus.open("floppy://a")
