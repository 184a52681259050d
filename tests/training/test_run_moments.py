"""Scales as tokens, from windows: the moments of groups are measured once, and losses are those of whole networks."""

from __future__ import annotations

import pickle
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from raywgen.corpus import Corpus
from raywgen.generators.common.tokenizer import Tokenizer
from raywgen.generators.common.tokenizer.config import Scales
from raywgen.storage import Storage
from raywgen.training import TrainConfig, launch, read_metrics, run_moments
from raywgen.training.batch_order import BatchDraw, BatchOrder, StageView
from raywgen.training.rows import RunRows
from raywgen.training.run_moments import FOLDER, stage_moments, with_moments
from raywgen.training.stored_weights import StoredWeights
from raywgen.weights import Layout, WeightBatch, WeightsError, Windows
from raywgen.weights.groups import groups_of, network_moments
from tests.builders import igpg_config
from tests.training.test_encode import generator_of

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 4
MEASURE = run_moments._measure


def config(corpus: Corpus, out: Path, scales: Scales, **settings: Any) -> TrainConfig:
    generator = igpg_config()
    generator.tokenizer = replace(generator.tokenizer, scales=scales, window=3, num_steps=STEPS, batch_size=8)
    generator.prior = replace(generator.prior, window=4, num_steps=STEPS, batch_size=8, independent_share=0.5)
    generator.task_loss.num_steps = 0
    fixed: dict[str, Any] = {"num_workers": 0, "validate_every": 2, "log_every": 1}
    return TrainConfig(corpus=corpus.location, out=str(out), generator=generator, **(fixed | settings))


def metrics(out: Path) -> list[dict[str, Any]]:
    rows = read_metrics(str(out))
    kept = ("stage", "step", "loss", "nll", "reconstruction", "snr_db", "val_loss")
    return [{name: row[name] for name in kept if name in row} for row in rows]


def whole_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the trainer read whole networks and measure no moments, and tokenisers cut windows out of all chunks."""
    draw, cut, window_header = BatchOrder.draw, Tokenizer.cut, Tokenizer.window_header
    whole: dict[str, Any] = {}

    def cut_whole(self: Tokenizer, batch: WeightBatch, *args: Any) -> WeightBatch:
        whole["values_BD"] = batch.values_BD
        return cut(self, batch, *args)

    def header_of(self: Tokenizer, batch: WeightBatch, *, by_code: bool = True) -> Any:
        whole["by_code"] = by_code
        return window_header(self, batch, by_code=by_code)

    def window_chunks(
        self: Tokenizer, _: Tensor, windows: Windows, layout: Layout, normalizer: Any, *rest: Any
    ) -> Tensor:
        chunks_BMK = self.chunks(whole["values_BD"], layout, normalizer, by_code=whole["by_code"])
        return torch.stack([each[index] for each, index in zip(chunks_BMK, windows.index_BW, strict=True)])

    monkeypatch.setattr(Tokenizer, "cut", cut_whole)
    monkeypatch.setattr(Tokenizer, "window_header", header_of)
    monkeypatch.setattr(Tokenizer, "window_chunks", window_chunks)

    def drawn(self: BatchOrder, step: int, size: int, view: StageView, *, whole: bool = False) -> BatchDraw:
        found = draw(self, step, size, view, whole=whole)
        return replace(found, windows=None, noise=view.noise(found.sample_index_B))

    monkeypatch.setattr(BatchOrder, "draw", drawn)
    monkeypatch.setattr("raywgen.training.trainer.stage_moments", lambda *_: {})


@pytest.mark.parametrize("scales", ["tensor", "filter"])
def test_windows_have_the_losses_of_whole_networks(
    zoo_corpus: Corpus, tmp_path: Path, scales: Scales, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(StoredWeights, "values", lambda *_: pytest.fail("a whole network was read"))
        launch([config(zoo_corpus, tmp_path / "windows", scales)], stop_at=0.5)
        launch([config(zoo_corpus, tmp_path / "windows", scales)])
    assert list((tmp_path / "windows" / FOLDER).iterdir())
    with monkeypatch.context() as patched:
        whole_networks(patched)
        patched.setattr(StoredWeights, "windows", lambda *_: pytest.fail("a window was read"))
        launch([config(zoo_corpus, tmp_path / "whole", scales)])
    found, expected = metrics(tmp_path / "windows"), metrics(tmp_path / "whole")
    assert len(found) == 2 * STEPS
    validated = [[row.pop("val_loss") for row in rows if "val_loss" in row] for rows in (found, expected)]
    assert found == expected
    # The numbers of the header are decoded many at once or few, and matrix products round by how many.
    assert validated[0] == pytest.approx(validated[1], rel=1e-5)
    assert validated[0]


class Measured:
    """Rows with moments, and which files were made for them."""

    def __init__(self, corpus: Corpus, out: str | Path, scales: Scales, monkeypatch: pytest.MonkeyPatch) -> None:
        self.corpus, self.out = corpus, out
        self.generator = generator_of(corpus, window=4, scales=scales)
        self.rows = RunRows.of(corpus)
        self.wanted = stage_moments(self.generator.stages()[1:2], self.rows)
        self.made: list[str] = []

        def watched(item: Any, *args: Any) -> None:
            self.made.append(item.name)
            MEASURE(item, *args)

        monkeypatch.setattr(run_moments, "_measure", watched)

    def get(self, **settings: Any) -> RunRows | None:
        return with_moments(self.rows, self.wanted, self.corpus, self.generator.normalizers, self.out, **settings)


def read(rows: RunRows, generator: Any) -> list[Tensor]:
    """The moments of the first windows of all layouts, as a worker on another node reads them."""
    found = []
    for part in (rows.train, rows.held):
        order = BatchOrder(pickle.loads(pickle.dumps([each.stored() for each in part])), seed=0)
        for turn in range(len(part)):
            draw = order.draw(turn, 8, StageView(generator.stages()[1], 0, 0))
            stored = order.read(draw, generator.stages()[1])
            assert stored.moments_BYK is not None
            found.append(stored.moments_BYK)
    return found


@pytest.mark.parametrize("scales", ["tensor", "filter"])
def test_moments_are_those_of_the_networks(
    zoo_corpus: Corpus, tmp_path: Path, scales: Scales, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = Measured(zoo_corpus, tmp_path, scales, monkeypatch)
    rows = measured.get()
    assert rows is not None
    assert len(measured.made) == len(set(measured.made)) > 1
    for each in [*rows.train, *rows.held]:
        layout, normalizer = each.layout, measured.generator.normalizers[each.layout.id][1]
        draw = BatchOrder([each], seed=0).draw(0, 8, StageView(measured.generator.stages()[1], 0, 0))
        assert draw.windows is not None
        assert draw.windows.header is not None
        values_BD = each.values(draw.row_B)
        moments_BN = network_moments(layout, scales, normalizer, lambda start, stop, v=values_BD: v[:, start:stop])
        expected = groups_of(layout, scales).header_moments(
            moments_BN, draw.windows.header.index_BY, draw.windows.chunk_length
        )
        found = each.header_moments(draw.row_B, draw.windows)
        assert found is not None
        assert torch.equal(found, expected)


def test_workers_share_the_work_and_what_is_there_is_used(
    zoo_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = Measured(zoo_corpus, tmp_path / "alone", "filter", monkeypatch)
    expected = alone.get()
    assert expected is not None
    both = Measured(zoo_corpus, tmp_path / "both", "filter", monkeypatch)
    found: dict[int, RunRows | None] = {}
    other = threading.Thread(target=lambda: found.update({1: both.get(rank=1, num_workers=2)}))
    other.start()
    found[0] = both.get(rank=0, num_workers=2)
    other.join()
    assert sorted(both.made) == sorted(alone.made)
    for rows in (found[0], found[1], both.get()):
        assert rows is not None
        pairs = zip(read(rows, both.generator), read(expected, alone.generator), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert len(both.made) == len(alone.made), "files were made again"


def test_a_worker_that_is_asked_to_stop_leaves_whole_files(
    zoo_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, asked = Measured(zoo_corpus, tmp_path, "tensor", monkeypatch), iter([False, True])
    assert measured.get(asked_to_stop=lambda: next(asked)) is None
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == measured.made[:1]
    assert measured.get() is not None
    assert len(set(measured.made)) == len(measured.made)


def test_a_damaged_file_is_named(zoo_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Measured(zoo_corpus, tmp_path, "tensor", monkeypatch)
    rows = measured.get()
    assert rows is not None
    for path in (tmp_path / FOLDER).iterdir():
        path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(WeightsError, match=rf"{tmp_path}.*safetensors cannot be read .* or delete {tmp_path}.*anew"):
        read(rows, measured.generator)
    shutil.rmtree(tmp_path / FOLDER)
    rows = measured.get()
    assert rows is not None
    assert read(rows, measured.generator)


def test_moments_of_a_run_in_a_store_are_copied_to_each_node(
    zoo_corpus: Corpus, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYWGEN_CACHE", str(tmp_path / "cache"))
    found: list[list[Tensor]] = []
    num_files = 0
    for out in (f"{bucket}/run", (tmp_path / "run").as_uri()):
        measured = Measured(zoo_corpus, out, "filter", monkeypatch)
        rows = measured.get()
        assert rows is not None
        found.append(read(rows, measured.generator))
        num_files = len(measured.made)
        assert len(Storage.at(out).walk(FOLDER)) == num_files
    assert len(list((tmp_path / "cache" / FOLDER).iterdir())) == num_files
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
