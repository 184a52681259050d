"""The costs of checkpoints, at sizes that say nothing of speed."""

from __future__ import annotations

from pathlib import Path

import pytest

from raywgen.benchmarks.checkpoint_costs import CheckpointCostsConfig, measure


@pytest.mark.slow
def test_one_process_and_two_measure_what_a_save_costs(tmp_path: Path) -> None:
    small = CheckpointCostsConfig(width=64, num_layers=1, batch_size=4, save_every=3, num_workers=[1, 2])
    small.folder = str(tmp_path)
    figures, conditions = measure(small)
    assert figures.keys() == {"checkpoint_stall", "save_peak_gib", "save_peak_over_share"}
    assert figures["checkpoint_stall"] > 0
    shares = [row["share_gib"] for row in conditions["processes"]]
    assert len(shares) == 3
    assert list(tmp_path.iterdir()) == []
