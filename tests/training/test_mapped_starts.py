"""Starts of large networks are mapped, wherever a run goes."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch

from raywgen.corpus import Corpus
from raywgen.generators.bundle import build_generator, load_bundle, save_bundle
from raywgen.generators.direct import Direct
from raywgen.storage import Storage
from raywgen.training import data
from raywgen.training.data import data_spec, measure_normalizers

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_large_start_is_mapped_wherever_the_run_goes_and_bundles_share_it(
    zoo_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = measure_normalizers(zoo_corpus, tmp_path / "starts")
    monkeypatch.setattr(data, "_MOST_HELD", 10)
    monkeypatch.setattr(data, "_PART", 7)
    mapped = measure_normalizers(zoo_corpus, tmp_path / "starts")
    files = sorted((tmp_path / "starts").iterdir())
    assert len(files) == len(mapped) == len(held)
    for layout_id, (_, normalizer) in mapped.items():
        arrived = pickle.loads(pickle.dumps(normalizer))
        assert len(pickle.dumps(normalizer)) < len(pickle.dumps(held[layout_id][1]))
        for each in (normalizer, arrived, normalizer.copy()):
            assert Path(each.start_file) in files
            assert torch.equal(each.base_D, held[layout_id][1].base_D)
            assert torch.equal(each.scale_D, held[layout_id][1].scale_D)
    generator = build_generator("direct", Direct.Config(), mapped, data_spec(zoo_corpus), 0)
    save_bundle(generator, tmp_path / "bundle", {})
    assert all(os.stat(file).st_nlink == 2 for file in files)
    loaded = load_bundle(tmp_path / "bundle")
    for layout_id, (_, normalizer) in loaded.normalizers.items():
        assert Path(normalizer.start_file).parent == tmp_path / "bundle" / "starts"
        assert torch.equal(normalizer.base_D, held[layout_id][1].base_D)


def test_a_start_of_a_run_in_a_store_is_copied_to_each_node(
    zoo_corpus: Corpus, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = measure_normalizers(zoo_corpus)
    monkeypatch.setattr(data, "_MOST_HELD", 10)
    mapped = measure_normalizers(zoo_corpus, f"{bucket}/run/starts")
    assert len(Storage.at(f"{bucket}/run").walk("starts")) == len(mapped)
    for layout_id, (layout, normalizer) in mapped.items():
        sent = pickle.dumps(normalizer)
        Path(normalizer.start_file).unlink()  # As on another node.
        assert torch.equal(pickle.loads(sent).base_D, held[layout_id][1].base_D)
        assert Path(normalizer.start_file).is_file()
        generator = build_generator(
            "direct", Direct.Config(), {layout_id: (layout, normalizer)}, data_spec(zoo_corpus), 0
        )
        save_bundle(generator, f"{bucket}/run/generator", {})
        (_, loaded) = load_bundle(f"{bucket}/run/generator").normalizers[layout_id]
        assert torch.equal(loaded.base_D, held[layout_id][1].base_D)
