"""A corpus on an object store is read where it lies, no more of it than is asked for, and nothing is copied."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import boto3
import numpy as np
import pytest
import torch
from pyarrow import fs
from torch import Tensor

from raywgen.corpus import ChangedCorpusError, Corpus, CorpusError, DamagedFileError, MissingFileError
from raywgen.corpus.checksums import PAGE_BYTES
from raywgen.corpus.commit import stored_shards
from raywgen.corpus.remote_view import RemoteView
from raywgen.training.stored_weights import StoredWeights
from raywgen.weights import Layout
from tests.corpus import builders
from tests.corpus.test_pages import LAYOUT, VALUES_OF_A_PAGE, flip, large, make


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make(tmp_path / "corpus")


def put(root: Path, location: str) -> str:
    """Uploads a corpus, whose files on the local disk are then removed."""
    filesystem, path = fs.FileSystem.from_uri(location + endpoint())
    fs.copy_files(str(root), path, destination_filesystem=filesystem)
    shutil.rmtree(root)
    return location


def endpoint() -> str:
    url = boto3.client("s3").meta.endpoint_url
    return f"?endpoint_override={url.replace(':', '%3A').replace('/', '%2F')}"


def weights_of(corpus: Corpus, layout_id: str) -> StoredWeights:
    return StoredWeights(corpus, corpus.layout(layout_id), corpus.select(layout_id=layout_id))


def read_all(corpus: Corpus) -> list[Tensor]:
    """Whole networks and windows of both layouts, in no order."""
    found = []
    for layout_id, network in corpus.networks.items():
        weights, num = weights_of(corpus, layout_id), network.layout.num_values
        index_B = torch.tensor([len(weights) - 1, 0, 1, 0])
        found.append(weights.values(index_B))
        for start, length in ((0, 5), (num // 2, 9), (min(num, VALUES_OF_A_PAGE) - 3, 8), (num - 2, 10)):
            start_B = torch.tensor([start, 0, max(0, start - 1), start])
            found.append(weights.windows(index_B, start_B, length))
    return found


@pytest.mark.parametrize("has_pages", [True, False])
def test_it_reads_what_a_mapped_corpus_holds_and_copies_nothing(bucket: str, tmp_path: Path, has_pages: bool) -> None:
    root = make(tmp_path / "corpus", has_pages=has_pages)
    expected = read_all(Corpus.open(root))
    assert all(torch.equal(*pair) for pair in zip(read_all(Corpus.open(root, copies=False)), expected, strict=True))
    location = put(root, f"{bucket}/corpus")
    corpus = Corpus.open(location, copies=False)
    assert all(torch.equal(*pair) for pair in zip(read_all(corpus), expected, strict=True))
    builders.assert_same_bits(corpus.state_dict("large1"), large(1))
    builders.assert_same_bits(corpus.state_dict("small2"), builders.network(2, 2))
    assert not (tmp_path / "cache").exists()


def test_a_window_costs_its_pages(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    at = RemoteView._at
    monkeypatch.setattr(RemoteView, "_at", lambda self, first, end: (read.append(end - first), at(self, first, end))[1])
    weights = weights_of(Corpus.open(root, copies=False), LAYOUT.id)
    weights.windows(torch.tensor([1]), torch.tensor([8]), 100)
    assert read == [PAGE_BYTES]
    weights.windows(torch.tensor([1]), torch.tensor([VALUES_OF_A_PAGE - 50]), 100)
    assert read[1:] == [2 * PAGE_BYTES], "neighbouring pages are one request"
    weights.windows(torch.tensor([1]), torch.tensor([2 * VALUES_OF_A_PAGE]), 100)
    assert read[2:] == [LAYOUT.num_bytes - 2 * PAGE_BYTES]


def test_small_networks_beside_each_other_are_one_request(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    at = RemoteView._at
    monkeypatch.setattr(RemoteView, "_at", lambda self, first, end: (read.append(end - first), at(self, first, end))[1])
    small = Layout.from_state_dict(builders.network(2, 0))
    weights_of(Corpus.open(root, copies=False), small.id).values(torch.tensor([2, 0, 1, 0]))
    assert read == [3 * small.num_bytes]


READERS: dict[str, Callable[[StoredWeights], object]] = {
    "whole": lambda weights: weights.values(torch.tensor([1])),
    "window": lambda weights: weights.windows(torch.tensor([1]), torch.tensor([VALUES_OF_A_PAGE]), 4),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("has_pages", [True, False])
def test_damage_is_named(tmp_path: Path, read: Callable[[StoredWeights], object], has_pages: bool) -> None:
    root = make(tmp_path / "corpus", has_pages=has_pages)
    flip(root, page=1)
    corpus = Corpus.open(root, copies=False)
    weights = weights_of(corpus, LAYOUT.id)
    weights.values(torch.tensor([0]))
    with pytest.raises(DamagedFileError, match=r"large\.arrow: checkpoint 'large1' has another checksum.*restore it"):
        read(weights)
    if has_pages:
        weights.windows(torch.tensor([1]), torch.tensor([0]), 4)


@pytest.mark.parametrize("is_opened", [True, False])
def test_a_shard_that_is_lost_while_it_is_read_is_named(bucket: str, root: Path, is_opened: bool) -> None:
    corpus = Corpus.open(put(root, f"{bucket}/corpus"), copies=False)
    weights = weights_of(corpus, LAYOUT.id)
    if is_opened:
        weights.windows(torch.tensor([0]), torch.tensor([0]), 4)
    boto3.client("s3").delete_object(Bucket="bucket", Key="corpus/weights/large.arrow")
    with pytest.raises(MissingFileError, match=r"s3://bucket/corpus/weights/large\.arrow is missing; restore it"):
        weights.windows(torch.tensor([0]), torch.tensor([0]), 4)


def test_a_corpus_that_grows_while_it_is_read_is_read_on(root: Path, tmp_path: Path) -> None:
    """A run reads the checkpoints that were there when it began; a later process of it is told."""
    corpus = Corpus.open(root, copies=False)
    before = read_all(corpus)
    more = builders.shard(root, "more", builders.states("more", 2, 2, 70))
    builders.commit(root, [*stored_shards(corpus), more], [LAYOUT, Layout.from_state_dict(builders.network(2, 0))])
    assert all(torch.equal(*pair) for pair in zip(read_all(corpus), before, strict=True))
    assert Corpus.open(root).facts.num_rows == 7
    with pytest.raises(ChangedCorpusError, match=f"{root} was rebuilt while it was read; run the same command again"):
        Corpus.open(root, corpus.snapshot)


def test_a_shard_that_becomes_shorter_is_named(root: Path) -> None:
    corpus = Corpus.open(root, copies=False)
    path = root / "weights/large.arrow"
    path.write_bytes(path.read_bytes()[:PAGE_BYTES])
    with pytest.raises(DamagedFileError, match=r"large\.arrow is truncated or no Arrow file \(it has no footer\)"):
        weights_of(corpus, LAYOUT.id).windows(torch.tensor([0]), torch.tensor([0]), 4)


def test_every_flipped_byte_is_found_or_does_no_harm(tmp_path: Path) -> None:
    """Of Arrow's own metadata too: reading ends in an error of the corpus or in the right weights."""
    root = tmp_path / "corpus"
    states = builders.states("net", 3, 2, 0)
    layout = Layout.from_state_dict(states["net0"])
    builders.commit(root, [builders.shard(root, "a", states)], [layout])
    path = root / "weights/a.arrow"
    whole, expected = path.read_bytes(), torch.stack([layout.flatten(state) for state in states.values()])
    masks = np.random.default_rng(0).integers(1, 256, len(whole), dtype=np.uint8)
    refusals: list[str] = []
    for place, mask in list(enumerate(masks))[::2]:
        content = bytearray(whole)
        content[place] ^= int(mask)
        path.write_bytes(content)
        try:
            found = weights_of(Corpus.open(root, copies=False), layout.id).values(torch.arange(3))
        except CorpusError as error:
            refusals.append(str(error))
        else:
            assert torch.equal(found, expected)
    assert len(refusals) > 50
    assert all("weights/a.arrow" in message for message in refusals)


class _Refusal(BaseHTTPRequestHandler):
    """Answers as a store does whose credentials are missing or wrong."""

    def do_HEAD(self) -> None:
        self.send_response(403)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Writes nothing."""


def test_missing_credentials_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Refusal)
    Thread(target=server.serve_forever, daemon=True).start()
    settings = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}", "AWS_EC2_METADATA_DISABLED": "true"}
    for name, value in (settings | {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "wrong"}).items():
        monkeypatch.setenv(name, value)
    message = r"^s3://bucket/zoo cannot be read \([^\n]*ACCESS_DENIED[^\n]*\); check the URI, [^\n]*credentials[^\n]*$"
    with pytest.raises(CorpusError, match=message):
        Corpus.open("s3://bucket/zoo", copies=False)
    server.shutdown()
