from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from raywgen.corpus import Corpus, CorpusError
from raywgen.corpus.build import BuildConfig, build_corpus
from raywgen.corpus.chunk_stream import ChunkBatch, ChunkStream
from raywgen.corpus.order import Cursor, EpochOrder


def networks() -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Plain float32, with counters between, mixed dtypes in two orders, complex values, and one of many pages."""
    torch.manual_seed(0)
    for index in range(7):
        yield f"mlp-{index}", nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)).state_dict()
    for index in range(4):
        yield f"norm-{index}", nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)).state_dict()
    for index in range(3):
        yield f"mixed-{index}", {"a": torch.randn(9), "b": torch.randn(4, 5).half(), "c": torch.randn(17).bfloat16()}
        yield f"half-{index}", {"a": torch.randn(6).half(), "b": torch.randn(40), "c": torch.randn(3).double()}
        yield f"complex-{index}", {"a": torch.randn(7, dtype=torch.complex64), "b": torch.randn(5)}
    yield "large", {"w": torch.randn(300, 500), "b": torch.randn(70_001)}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("nets")
    for name, state in networks():
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / f"{name}.safetensors")
    out = str(tmp_path_factory.mktemp("corpus") / "c")
    return build_corpus(BuildConfig(out=out, sources=[str(folder)], distributed=False))


def stream(corpus: Corpus, **changes: object) -> ChunkStream:
    values: dict[str, object] = {
        "chunk_length": 16,
        "batch_size": 10,
        "seed": 3,
        "terms": ["num_values<1000"],
    } | changes
    return ChunkStream(corpus, **values)  # pyright: ignore[reportArgumentType]


def keys(batches: Iterator[ChunkBatch]) -> list[list[tuple[int, int]]]:
    return [list(zip(b.checkpoint_B.tolist(), b.chunk_B.tolist(), strict=True)) for b in batches]


@pytest.mark.parametrize("chunk_length", [1, 7, 16, 1000])
def test_every_chunk_of_every_layout_holds_the_flat_vectors_values(corpus: Corpus, chunk_length: int) -> None:
    whole = stream(corpus, chunk_length=chunk_length, terms=[], batch_size=64)
    found: dict[tuple[int, int], Tensor] = {}
    for batch in whole.epoch():
        for row, chunk, length, values in zip(
            batch.checkpoint_B.tolist(), batch.chunk_B.tolist(), batch.length_B.tolist(), batch.values_BK, strict=True
        ):
            assert (row, chunk) not in found, "a chunk came twice"
            assert not values[length:].any()
            found[row, chunk] = values[:length].clone()
    for row in range(whole.facts.num_rows):
        expected = corpus.values(whole.facts.slice(row, 1))[0]
        parts = [found.pop((row, chunk)) for chunk in range(-(-len(expected) // chunk_length))]
        assert torch.equal(torch.cat(parts), expected)
    assert not found


@pytest.mark.parametrize("num_workers", [2, 3])
def test_workers_together_see_the_batches_of_one_worker(corpus: Corpus, num_workers: int) -> None:
    alone = keys(stream(corpus).epoch())
    parts = [keys(stream(corpus, rank=rank, num_workers=num_workers).epoch()) for rank in range(num_workers)]
    for index, batch in enumerate(alone):
        together = [key for part in parts for key in part[index]]
        assert sorted(together) == sorted(batch)
        # Where a batch does not divide, the first workers have the items that are left.
        assert [len(part[index]) for part in parts] == [len(batch[rank::num_workers]) for rank in range(num_workers)]


def test_order_depends_on_seed_and_epoch(corpus: Corpus) -> None:
    first = keys(stream(corpus).epoch())
    assert keys(stream(corpus).epoch()) == first
    assert keys(stream(corpus, seed=4).epoch()) != first
    second = stream(corpus, cursor=Cursor(epoch=1))
    assert keys(second.epoch()) != first
    assert second.cursor == Cursor(epoch=2)


@pytest.mark.parametrize("prefetch", [0, 3])
def test_a_resumed_stream_goes_on_at_the_next_unseen_batch(corpus: Corpus, prefetch: int) -> None:
    expected = [keys(iter([batch]))[0] for _, batch in zip(range(40), stream(corpus, prefetch=0), strict=False)]
    begun = stream(corpus, prefetch=prefetch)
    head = [(keys(iter([batch]))[0], batch.cursor) for _, batch in zip(range(17), begun, strict=False)]
    resumed = stream(corpus, cursor=Cursor(**head[-1][1].to_json()))
    tail = [keys(iter([batch]))[0] for _, batch in zip(range(23), resumed, strict=False)]
    assert [key for key, _ in head] + tail == expected


def test_read_ahead_never_overwrites_what_the_caller_holds(corpus: Corpus) -> None:
    for batch in stream(corpus, prefetch=2, terms=[], batch_size=200, chunk_length=64).epoch():
        held = batch.values_BK.clone()
        torch.rand(200, 200).matmul(torch.rand(200, 200))
        assert torch.equal(held, batch.values_BK)


def test_nothing_selected_and_wrong_numbers_are_refused(corpus: Corpus) -> None:
    with pytest.raises(CorpusError, match="holds no checkpoint"):
        stream(corpus, terms=["architecture=none"])
    with pytest.raises(CorpusError, match="batch_size=0"):
        stream(corpus, batch_size=0)
    with pytest.raises(CorpusError, match="rank=2 of 2"):
        stream(corpus, rank=2, num_workers=2)


def test_a_shard_that_goes_missing_is_one_clear_error(corpus: Corpus, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(corpus.location, copy)
    opened = Corpus.open(copy)
    for shard in (copy / "weights").iterdir():
        shard.unlink()
    with pytest.raises(CorpusError, match=r"weights/.*is missing"):
        next(iter(stream(opened)))


@settings(max_examples=80)
@given(
    num_items=st.integers(1, 300),
    batch_size=st.integers(1, 40),
    block_size=st.integers(1, 50),
    blocks_per_window=st.integers(1, 6),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 5),
)
def test_an_epoch_is_a_permutation(
    num_items: int, batch_size: int, block_size: int, blocks_per_window: int, seed: int, epoch: int
) -> None:
    order = EpochOrder(num_items, batch_size, block_size=block_size, blocks_per_window=blocks_per_window, seed=seed)
    cursor, seen = Cursor(epoch=epoch), []
    for _ in range(order.num_batches):
        assert cursor.epoch == epoch
        seen += order.batch(cursor).tolist()
        cursor = order.after(cursor)
    assert cursor == Cursor(epoch=epoch + 1)
    assert sorted(seen) == list(range(num_items))


def test_each_epoch_mixes_other_blocks() -> None:
    """Blocks are drawn anew too: else the same items would meet in every epoch, and the same ones come last."""
    order = EpochOrder(1000, 40, block_size=10, blocks_per_window=4, seed=0)
    first, second = ({int(item) // 10 for item in order.batch(Cursor(epoch=epoch))} for epoch in (0, 1))
    assert first != second


def test_neighbours_are_spread_over_the_epoch() -> None:
    order = EpochOrder(10_000, 100, block_size=50, blocks_per_window=8, seed=0)
    positions = {item: place for batch in range(100) for place, item in enumerate(order.batch(Cursor(batch=batch)))}
    assert len(positions) == 10_000
    first = order.batch(Cursor())
    # One window mixes 8 blocks of 50 drawn from anywhere: a batch of it touches most of them.
    assert len({int(item) // 50 for item in first}) >= 6
