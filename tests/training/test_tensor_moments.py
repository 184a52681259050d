"""Normalisers are measured in blocks, whatever the number and the size of networks."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor

from raywgen.corpus import Corpus
from raywgen.generators.bundle import build_generator, load_bundle, save_bundle
from raywgen.generators.direct import Direct
from raywgen.training import data, tensor_moments
from raywgen.training.data import data_spec, measure_normalizers
from raywgen.training.tensor_moments import Moments, measured_normalizer
from raywgen.weights import Normalizer
from tests.training.held_weights import HeldWeights
from tests.weights.test_normalizer import trained

pytestmark = pytest.mark.usefixtures("one_thread")


class Counted(HeldWeights):
    """Networks in memory, which remember how much was read at once."""

    most = 0

    def values(self, index_B: Tensor) -> Tensor:
        found = super().values(index_B)
        self.most = max(self.most, found.numel())
        return found

    def windows(self, index_B: Tensor, start_B: Tensor, length: int) -> Tensor:
        found = super().windows(index_B, start_B, length)
        self.most = max(self.most, found.numel())
        return found


@pytest.mark.parametrize("start", [False, True])
def test_one_block_gives_the_numbers_of_the_whole(start: bool) -> None:
    layout, values_ND = trained(6, 4, 5, 3)
    start_D = 3 * values_ND[0] if start else None
    found = measured_normalizer(HeldWeights(values_ND), layout, start_D)
    wanted = Normalizer.measure(layout, values_ND, start_D)
    assert torch.equal(found.base_N, wanted.base_N)
    assert torch.equal(found.scale_N, wanted.scale_N)


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("block", [7, 33, 100])
def test_blocks_of_any_size_give_the_same(block: int, start: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks have 58 values: blocks are parts of one, or several."""
    layout, values_ND = trained(9, 4, 5, 3)
    start_D = 3 * values_ND[0] if start else None
    wanted = Normalizer.measure(layout, values_ND.double(), None if start_D is None else start_D.double())
    monkeypatch.setattr(tensor_moments, "_BLOCK", block)
    weights = Counted(values_ND)
    found = measured_normalizer(weights, layout, start_D)
    # Float32 of the blocks' own means and deviations, against float64 of all values.
    torch.testing.assert_close(found.scale_N, wanted.scale_N.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.base_N, wanted.base_N.float(), rtol=1e-5, atol=1e-6)
    assert 0 < weights.most <= block


def test_moments_of_parts_are_those_of_all() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 3 + 50
    seen = Moments()
    for part in (values[:1], values[1:400], values[400:400], values[400:]):
        seen.add(part)
    assert seen.count == 1000
    assert seen.mean == pytest.approx(float(values.double().mean()), rel=1e-6)
    assert seen.deviation == pytest.approx(float(values.double().std(unbiased=False)), rel=1e-5)


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
