"""A window of a large checkpoint is used once its own pages are compared, not all of the checkpoint."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from raywgen.corpus import Corpus, DamagedFileError, verify_corpus
from raywgen.corpus.build import BuildConfig, build_corpus
from raywgen.corpus.checksums import PAGE_BYTES, PAGE_SUMS, page_sums
from raywgen.corpus.derive import split
from raywgen.corpus.describe import describe
from raywgen.corpus.merge import merge
from raywgen.corpus.shards import ShardView
from raywgen.corpus.verify import repair_corpus
from raywgen.training.stored_weights import StoredWeights
from raywgen.weights import Layout, StateDict
from tests.corpus import builders

# Three pages, of which the last is short.
VALUES_OF_A_PAGE = PAGE_BYTES // 4
SHAPE = (5, VALUES_OF_A_PAGE // 2)


def large(seed: int) -> StateDict:
    return {"weight": torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))}


LAYOUT = Layout.from_state_dict(large(0))


def make(root: Path, *, has_pages: bool = True) -> Path:
    """Two large networks and some small ones."""
    shards = [
        builders.shard(root, "large", {f"large{seed}": large(seed) for seed in range(2)}),
        builders.shard(root, "small", builders.states("small", 3, 2, 0)),
    ]
    if not has_pages:
        shards = [replace(each, facts=[drop_pages(row) for row in each.facts]) for each in shards]
    builders.commit(root, shards, [LAYOUT, Layout.from_state_dict(builders.network(2, 0))])
    return root


def drop_pages(row: dict) -> dict:
    return {name: value for name, value in row.items() if name != PAGE_SUMS}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make(tmp_path / "corpus")


def expected(checkpoint_id: str) -> bytes | None:
    return page_sums(LAYOUT.pack(large(int(checkpoint_id[-1]))).numpy().data) if "large" in checkpoint_id else None


def assert_has_pages(corpus: Corpus) -> None:
    """Looks whether a corpus holds the checksums of the pages of its large checkpoints, and of no others."""
    found = {name: corpus.page_sums(name) for name in corpus.facts.column("checkpoint_id").to_pylist()}
    assert found == {name: expected(name) for name in found}
    assert any(found.values())
    assert PAGE_SUMS not in corpus.facts.column_names
    assert verify_corpus(corpus.location) == []


def flip(root: Path, page: int, checkpoint: int = 1) -> None:
    """Flips a bit in a page of a large network."""
    (path,) = (root / "weights").glob("*large.arrow")
    content = bytearray(path.read_bytes())
    place = content.find(LAYOUT.pack(large(checkpoint)).numpy().tobytes())
    content[place + page * PAGE_BYTES + 9] ^= 1
    path.write_bytes(content)


def window(root: Path, index: int, start: int, length: int = 8) -> Tensor:
    """Reads a window of a large network of a newly opened corpus."""
    corpus = Corpus.open(root)
    weights = StoredWeights(corpus, corpus.layout(LAYOUT.id), corpus.select(layout_id=LAYOUT.id))
    found_1X = weights.windows(torch.tensor([index]), torch.tensor([start]), length)
    assert torch.equal(found_1X[0], large(index)["weight"].flatten()[start : start + length])
    return found_1X


def test_a_window_is_read_where_another_page_is_damaged(root: Path) -> None:
    flip(root, page=1)
    for start in (0, VALUES_OF_A_PAGE - 8, 2 * VALUES_OF_A_PAGE):
        window(root, 1, start)
    window(root, 0, VALUES_OF_A_PAGE)
    first, last = PAGE_BYTES, 2 * PAGE_BYTES - 1
    for start in (VALUES_OF_A_PAGE - 7, VALUES_OF_A_PAGE + 1000, 2 * VALUES_OF_A_PAGE - 1):
        message = rf"large\.arrow: checkpoint 'large1' has another checksum .* in bytes {first} to {last}; restore"
        with pytest.raises(DamagedFileError, match=message):
            window(root, 1, start)
    with pytest.raises(DamagedFileError, match="checkpoint 'large1' has another checksum"):
        Corpus.open(root).state_dict("large1")


def test_a_page_is_compared_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    corpus = Corpus.open(root)
    view = corpus.view("weights/large.arrow", corpus.form("weights/large.arrow"))
    assert isinstance(view, ShardView)
    compare = view._check.compare_page
    monkeypatch.setattr(
        view._check, "compare_page", lambda row, page, *more: (compared.append((row, page)), compare(row, page, *more))
    )
    for _ in range(2):
        view.ranges(1, [(0, 4), (PAGE_BYTES - 4, PAGE_BYTES + 4)])
    assert compared == [(1, 0), (1, 1)]
    view.packed(1)
    view.ranges(1, [(2 * PAGE_BYTES, 2 * PAGE_BYTES + 4)])
    assert compared == [(1, 0), (1, 1)]


def test_without_checksums_of_pages_all_of_a_checkpoint_is_compared(tmp_path: Path) -> None:
    root = make(tmp_path / "corpus", has_pages=False)
    assert not (root / "pages.parquet").exists()
    assert verify_corpus(root) == []
    window(root, 1, 0)
    flip(root, page=1)
    window(root, 0, 0)
    with pytest.raises(DamagedFileError, match=r"checkpoint 'large1' has another checksum than its facts; restore"):
        window(root, 1, 0)


def test_every_operation_keeps_or_makes_them(root: Path, tmp_path: Path) -> None:
    corpus = Corpus.open(root)
    assert_has_pages(corpus)
    assert_has_pages(split(str(tmp_path / "split"), corpus, by="checkpoint_id", heldout=0.4))
    assert_has_pages(merge(str(tmp_path / "merged"), [corpus]))
    describe(root, [replace(builders.task(), instruction="Is it not?")], {})
    assert_has_pages(Corpus.open(root))
    (root / "weights/small.arrow").unlink()
    assert_has_pages(repair_corpus(root, verify_corpus(root)))


def test_ingest_makes_them(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    save_file(large(1), tmp_path / "files" / "large1.safetensors")
    out = str(tmp_path / "corpus")
    assert_has_pages(build_corpus(BuildConfig(out=out, sources=[str(tmp_path / "files")], distributed=False)))


@pytest.mark.parametrize("is_missing", [True, False])
def test_damaged_checksums_of_pages_are_named_and_made_anew(root: Path, is_missing: bool) -> None:
    path = root / "pages.parquet"
    if is_missing:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=r"pages\.parquet (is missing|has another checksum)"):
        window(root, 0, 0)
    (damage,) = verify_corpus(root)
    assert (damage.file, damage.checkpoint_ids) == ("pages.parquet", ())
    assert_has_pages(repair_corpus(root, [damage]))


def test_checksums_of_other_pages_are_found(tmp_path: Path) -> None:
    root = tmp_path / "corpus"
    written = builders.shard(root, "large", {"large0": large(0)})
    (row,) = written.facts
    wrong = replace(written, facts=[row | {PAGE_SUMS: "0" * len(row[PAGE_SUMS])}])
    builders.commit(root, [wrong], [LAYOUT])
    (damage,) = verify_corpus(root)
    assert damage.reason == "has other pages of checkpoint 'large0' than pages.parquet says"
    shutil.rmtree(root)
