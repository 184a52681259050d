"""The whole life of a corpus on a real S3 server."""

from __future__ import annotations

from pathlib import Path

import boto3
import pytest
import torch
from safetensors.torch import load_file, save_file

from raywgen.corpus import Corpus, CorpusError, DamagedFileError, MissingFileError, verify_corpus
from raywgen.corpus.build import BuildConfig, build_corpus
from raywgen.corpus.derive import dedupe, split
from raywgen.corpus.export import export
from raywgen.corpus.merge import merge
from raywgen.corpus.verify import repair_corpus
from raywgen.out_folder import OutError


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "files"
    folder.mkdir()
    for index in range(12):
        torch.manual_seed(index)
        save_file({"w": torch.randn(6, 5), "n": torch.tensor(index)}, folder / f"net-{index:02d}.safetensors")
    save_file({"w": torch.randn(300, 500).half()}, folder / "large.safetensors")
    save_file({"w": torch.tensor(float("nan"))}, folder / "bad.safetensors")
    return folder


def keys(prefix: str) -> list[str]:
    return [row["Key"] for row in boto3.client("s3").list_objects_v2(Bucket="bucket", Prefix=prefix)["Contents"]]


def test_a_corpus_lives_on_s3_as_on_a_disk(bucket: str, files: Path, tmp_path: Path) -> None:
    config = BuildConfig(out=f"{bucket}/zoo", sources=[str(files)], distributed=False)
    corpus = build_corpus(config)
    assert (corpus.facts.num_rows, corpus.quarantine.num_rows) == (13, 1)
    assert build_corpus(config).manifest == corpus.manifest
    assert not [key for key in keys("zoo/") if "units/" in key or "partial" in key]
    assert verify_corpus(corpus.location) == []

    for path in export(Corpus.open(corpus.location), tmp_path / "back"):
        stored, original = load_file(path), load_file(files / path.name)
        assert all(torch.equal(stored[name], tensor) for name, tensor in original.items())

    total, num_chunks = 0.0, 0
    for batch in corpus.stream(chunk_length=64, batch_size=50).epoch():
        total += float(batch.values_BK.double().sum())
        num_chunks += len(batch.length_B)
    assert num_chunks == 12 + -(-150_000 // 64)
    expected = sum(float(state["w"].double().sum()) for _, state in corpus.checkpoints())
    assert total == pytest.approx(expected, abs=1e-3)

    small = ["num_values<1000"]
    halves = split(f"{bucket}/halves", corpus, by="checkpoint_id", heldout=0.25, seed=1)
    assert halves.info()["splits"] == {"train": 10, "heldout": 3}
    both = merge(f"{bucket}/both", [corpus, halves])
    assert both.facts.num_rows == 26
    assert dedupe(f"{bucket}/once", both).facts.num_rows == 13
    assert both.query(small).num_rows == 24


def test_a_damaged_object_is_named_and_taken_out(bucket: str, files: Path) -> None:
    corpus = build_corpus(BuildConfig(out=f"{bucket}/zoo", sources=[str(files)], distributed=False))
    path = corpus.query(["checkpoint_id=large"]).column("shard")[0].as_py()
    client = boto3.client("s3")
    body = bytearray(client.get_object(Bucket="bucket", Key=f"zoo/{path}")["Body"].read())
    body[len(body) // 2] ^= 1
    client.put_object(Bucket="bucket", Key=f"zoo/{path}", Body=bytes(body))
    with pytest.raises(DamagedFileError, match="another checksum"):
        Corpus.open(corpus.location).state_dict("large")
    (damage,) = verify_corpus(corpus.location)
    assert damage.checkpoint_ids == ("large",)
    repaired = repair_corpus(corpus.location, [damage])
    assert repaired.facts.num_rows == 12
    assert verify_corpus(corpus.location) == []


def test_what_is_not_there_is_one_clear_error(bucket: str, files: Path) -> None:
    with pytest.raises(MissingFileError, match="it is no corpus"):
        Corpus.open(f"{bucket}/nothing")
    with pytest.raises(OutError, match="s3://missing/zoo cannot be written to: there is no such bucket"):
        build_corpus(BuildConfig(out="s3://missing/zoo", sources=[str(files)], distributed=False))


def test_files_on_s3_are_a_source_like_files_on_a_disk(bucket: str, files: Path, tmp_path: Path) -> None:
    client = boto3.client("s3")
    for path in files.iterdir():
        client.upload_file(str(path), "bucket", f"nets/deep/{path.name}")
    client.put_object(Bucket="bucket", Key="nets/deep/config.json", Body=b'{"architectures": ["Net"]}')
    here = build_corpus(BuildConfig(out=str(tmp_path / "here"), sources=[str(files)], distributed=False))
    sums = set(here.facts.column("sha256").to_pylist())
    there = build_corpus(BuildConfig(out=f"{bucket}/a", sources=[f"{bucket}/nets"], distributed=False))
    assert set(there.facts.column("sha256").to_pylist()) == sums
    assert set(there.facts.column("architecture").to_pylist()) == {"Net"}
    assert there.quarantine.column("checkpoint_id").to_pylist() == ["deep/bad"]
    some = build_corpus(BuildConfig(out=f"{bucket}/b", sources=[f"{bucket}/nets/*/net-0[1-3].*"], distributed=False))
    assert some.facts.column("checkpoint_id").to_pylist() == ["deep/net-01", "deep/net-02", "deep/net-03"]
    one = build_corpus(
        BuildConfig(out=f"{bucket}/c", sources=[f"{bucket}/nets/deep/large.safetensors"], distributed=False)
    )
    assert one.facts.column("checkpoint_id").to_pylist() == ["large"]
    again = build_corpus(BuildConfig(out=str(tmp_path / "again"), sources=[there.location], distributed=False))
    assert set(again.facts.column("sha256").to_pylist()) == sums
    with pytest.raises(CorpusError, match="s3://bucket/empty holds no checkpoint"):
        build_corpus(BuildConfig(out=f"{bucket}/d", sources=[f"{bucket}/empty"], distributed=False))
