"""Keys of an object store may hold any sign; one that cannot be opened costs nothing else."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import boto3
import pytest
import torch
from moto.server import ThreadedMotoServer

from raywgen.corpus import CorpusError
from tests.field.builders import build, ids, net, reasons, same

SIGNS = ["x y", "lr=0.1", "x+y", "100%", "a%20b", "é", "q?x", "h#x", "run[1]", "a,b", "a@b:c", "'q'", "*", "~", "&;"]


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        }.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="zoo")
        for index, signs in enumerate(SIGNS):
            put(f"odd/{signs}/net.pt", index)
        put("ok/a/net.pt", 1)
        put("ok//double/net.pt", 2)
        for marker in ("ok/", "ok/a/", "ok/a/empty.pt"):
            boto3.client("s3").put_object(Bucket="zoo", Key=marker, Body=b"")
        yield "s3://zoo"
    urlopen(Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
    server.stop()


def put(key: str, seed: int) -> None:
    buffer = io.BytesIO()
    torch.save(net(seed), buffer)
    boto3.client("s3").put_object(Bucket="zoo", Key=key, Body=buffer.getvalue())


def test_every_sign_in_a_key_is_opened(bucket: str, tmp_path: Path) -> None:
    corpus = build(tmp_path, f"{bucket}/odd")
    assert ids(corpus) == sorted(f"{signs}/net" for signs in SIGNS)
    assert reasons(corpus) == {}
    for index, signs in enumerate(SIGNS):
        name = f"{signs}/net"
        rows = dict(zip(corpus.facts.column("checkpoint_id").to_pylist(), range(len(SIGNS)), strict=True))
        state = corpus.layout(corpus.facts.column("layout_id")[rows[name]].as_py()).unpack(
            corpus.packed(corpus.facts.slice(rows[name], 1))
        )
        assert torch.equal(state["fc.bias"][0], net(index)["fc.bias"])


@pytest.mark.parametrize(
    "source", ["odd/x y", "odd/x%20y", "odd/100%", "odd/100%25", "odd/é/net.pt", "odd/q%3Fx/net.pt"]
)
def test_a_location_may_be_written_with_or_without_escapes(bucket: str, tmp_path: Path, source: str) -> None:
    assert ids(build(tmp_path, f"{bucket}/{source}")) == ["net"]


@pytest.mark.parametrize("source", ["ok", "ok/", ""])
def test_what_cannot_be_opened_is_named_and_the_rest_comes_in(bucket: str, tmp_path: Path, source: str) -> None:
    corpus = build(tmp_path, f"{bucket}/{source}")
    assert [name for name in ids(corpus) if "a/net" in name]
    refusals = {name: reason for name, reason in reasons(corpus, "refused").items() if "odd" not in name}
    assert len(refusals) == 2
    assert any("has an empty part" in reason and "ok//double" in reason for reason in refusals.values())
    with pytest.raises(CorpusError, match="2 checkpoints were refused"):
        build(tmp_path, f"{bucket}/{source}", out="strict", strict=True)


def test_a_file_rewritten_after_strict_is_taken(bucket: str, tmp_path: Path) -> None:
    put("mend/a.pt", 1)
    boto3.client("s3").put_object(Bucket="zoo", Key="mend/b.pt", Body=b"none")
    with pytest.raises(CorpusError, match=r"mend/b\.pt"):
        build(tmp_path, f"{bucket}/mend", strict=True)
    put("mend/b.pt", 2)
    same(build(tmp_path, f"{bucket}/mend", strict=True), "b", net(2))
