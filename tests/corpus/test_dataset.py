"""A corpus through real Ray Data equals what is read directly."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pyarrow as pa
import pytest
import ray
import ray.data
import torch

from raywgen.corpus import Corpus, CorpusError, packed_tensor
from raywgen.weights import Layout, StateDict
from tests.corpus import builders


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> tuple[Corpus, dict[str, StateDict]]:
    return builders.small_corpus(tmp_path_factory.mktemp("with space"))


def blocks_of(stream: ray.data.Dataset) -> list[pa.Table]:
    return cast("list[pa.Table]", list(stream.iter_batches(batch_size=None, batch_format="pyarrow")))


def test_blocks_are_record_batches_in_order_and_equal_direct_reading(
    opened: tuple[Corpus, dict[str, StateDict]],
) -> None:
    corpus, states = opened
    blocks = blocks_of(corpus.dataset(["train"]))
    assert [block.num_rows for block in blocks] == [512, 88, 3]
    ids = [name for block in blocks for name in block["checkpoint_id"].to_pylist()]
    assert ids == corpus.select(split="train")["checkpoint_id"].to_pylist()
    for block in blocks:
        assert block.column_names == ["checkpoint_id", "packed", "layout_id"]
        (layout_id,) = set(block["layout_id"].to_pylist())
        layout = corpus.networks[layout_id].layout
        packed_NP = packed_tensor(block, layout)
        for row, name in enumerate(block["checkpoint_id"].to_pylist()):
            builders.assert_same_bits(layout.unpack(packed_NP[row]), states[name])
        wanted_ND = corpus.values(corpus.select(checkpoint_id=block["checkpoint_id"].to_pylist()))
        assert torch.equal(layout.values(packed_NP), wanted_ND)


def test_direct_blocks_are_those_of_the_stream(opened: tuple[Corpus, dict[str, StateDict]]) -> None:
    corpus, _ = opened
    splits = ["heldout", "train"]
    streamed = blocks_of(corpus.dataset(splits))
    direct = list(corpus.blocks(splits))
    assert [block.to_pylist() for block in direct] == [block.to_pylist() for block in streamed]


def test_order_is_the_same_every_time(
    opened: tuple[Corpus, dict[str, StateDict]],
) -> None:
    corpus, _ = opened
    stream = corpus.dataset(["train", "heldout", "base"])
    orders = [[row["checkpoint_id"] for row in stream.iter_rows()] for _ in range(2)]
    assert orders[0] == orders[1] == corpus.facts["checkpoint_id"].to_pylist()


def test_shards_of_other_splits_are_never_opened(tmp_path: Path) -> None:
    corpus, _ = builders.small_corpus(tmp_path)
    held = Corpus.open(shutil.copytree(tmp_path, tmp_path / "copy"))
    for name in ("a-narrow", "b-wide", "d-base"):
        (tmp_path / f"copy/weights/{name}.arrow").unlink()
    stream = held.dataset(["heldout"])
    assert [row["checkpoint_id"] for row in stream.iter_rows()] == ["held0", "held1", "held2", "held3"]
    assert corpus.facts.num_rows == 608


def test_a_shard_cut_short_stops_the_stream_with_its_name(tmp_path: Path) -> None:
    corpus, _ = builders.small_corpus(tmp_path)
    stream = corpus.dataset(["heldout"])
    path = tmp_path / "weights/c-held.arrow"
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(Exception, match=r"weights/c-held\.arrow is truncated .*restore it or build"):
        list(stream.iter_rows())


def test_a_split_without_checkpoints_is_refused(opened: tuple[Corpus, dict[str, StateDict]]) -> None:
    with pytest.raises(CorpusError, match=r"no checkpoint of the splits \['unseen'\]"):
        opened[0].dataset(["unseen"])


def test_other_streams_keep_their_settings(opened: tuple[Corpus, dict[str, StateDict]]) -> None:
    before = ray.data.DataContext.get_current().execution_options.preserve_order
    opened[0].dataset(["base"])
    assert ray.data.DataContext.get_current().execution_options.preserve_order == before


def test_shards_are_written_by_ray_tasks(tmp_path: Path) -> None:
    write = ray.remote(num_cpus=1)(builders.shard)
    states = {name: builders.states(name, 3, 2, seed) for name, seed in (("a", 0), ("b", 10))}
    shards = ray.get([write.remote(tmp_path, name, networks) for name, networks in states.items()])
    corpus = builders.commit(tmp_path, shards, [Layout.from_state_dict(states["a"]["a0"])])
    assert corpus.facts["checkpoint_id"].to_pylist() == ["a0", "a1", "a2", "b0", "b1", "b2"]
    builders.assert_same_bits(corpus.state_dict("b1"), states["b"]["b1"])
