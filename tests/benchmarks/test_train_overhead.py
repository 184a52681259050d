"""The trainer and a bare loop take turns on the same batches, at sizes that say nothing of speed."""

from __future__ import annotations

from pathlib import Path

import pytest

from raywgen.benchmarks.train_overhead import TrainOverheadConfig, measure

SMALL = {"num_networks": 4, "num_values": 50_000, "width": 16, "num_layers": 1, "window": 16, "num_steps": 12}


@pytest.mark.slow
def test_one_and_two_processes_train_as_a_bare_loop(tmp_path: Path) -> None:
    limited = {"limit_gib": 1.0, "large_values": 100_000, "over_limit": 0.001}
    figures, conditions = measure(
        TrainOverheadConfig(**SMALL, **limited, startup=False, checkpoints=False, folder=str(tmp_path))
    )
    overheads = {"overhead_1", "overhead_2", "overhead_2_zero"}
    assert figures.keys() == overheads | {"input_wait", "token_speedup", "token_ratio"}
    assert figures["token_ratio"] > 2
    assert conditions["processes_1"]["largest_loss_rel_diff"] == 0
    assert conditions["processes_2"]["largest_loss_rel_diff"] < 1e-4
    assert conditions["processes_2_zero"]["largest_loss_rel_diff"] < 1e-4
    assert 0 <= figures["input_wait"] < 1
    assert 0 < conditions["input"]["anon_gib"] < 1


def test_a_measurement_needs_a_block_of_steps() -> None:
    with pytest.raises(ValueError, match="num_steps=11: give at least 12"):
        TrainOverheadConfig(num_steps=11)
