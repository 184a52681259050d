"""Every benchmark runs, at sizes that say nothing of speed."""

from __future__ import annotations

from pathlib import Path

import pytest

from raywgen.benchmarks.run import run

SHARED = Path(__file__).parents[2] / "../shared/data"
pytestmark = pytest.mark.slow


def test_corpus_ingest(tmp_path: Path) -> None:
    figures = run(["corpus-ingest", "num_medium=0", "num_small=30", "rounds=1", f"folder={tmp_path}"])["figures"]
    assert figures.keys() == {
        "ratio_to_copy",
        "ratio_to_copy_one_process",
        "small_safetensors_per_second",
        "small_pt_per_second",
    }
    assert all(value > 0 for value in figures.values())


def test_corpus_stream() -> None:
    settings = ["num_checkpoints=4", "num_values=300000", "batch_size=32", "num_batches=3", "rounds=1", "num_steps=4"]
    result = run(["corpus-stream", *settings])
    assert result["figures"]["peak_anon_gib"] < result["conditions"]["data_limit_gib"]
    assert 0 <= result["figures"]["exposed_wait"] < 1


def test_zoo_fit() -> None:
    result = run(["zoo-fit", "num_steps=3", "rounds=1", "num_cnns=2", "networks_per_actor=1"])
    assert {"speedup_cnn", "speedup_mlp", "speedup_head", "speedup_sam", "efficiency_2_actors"} == set(
        result["figures"]
    )
    assert all(case["relative_difference"] < 1e-4 for case in map(result["conditions"].get, ("cnn", "mlp", "sam")))


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not there")
def test_zoo_quality(tmp_path: Path) -> None:
    data = [f"data={SHARED}/mnist-train.parquet", f"test_data={SHARED}/mnist-test.parquet"]
    small = ["num_networks=3", "num_sam=2", "num_steps=30", "num_iterations=3", f"folder={tmp_path}"]
    figures = run(["zoo-quality", *data, *small])["figures"]
    assert 20 < figures["accuracy_mean"] < 100
    assert figures["eigenvalue_plain"] > 0
