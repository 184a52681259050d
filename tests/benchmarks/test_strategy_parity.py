"""Parallel strategies train alike, over real processes."""

from __future__ import annotations

import pytest

from raywgen.benchmarks.strategy_parity import StrategyParityConfig, measure


@pytest.mark.slow
def test_two_and_three_processes_train_as_one() -> None:
    """Parts are unequal, shards are padded, and a run of two is gone on with by three."""
    config = StrategyParityConfig(
        cases=["igpg-prior", "igpg-tokenizer-live", "mcdi-reptile"],
        num_steps=4,
        num_workers=[2, 3],
        zero_stages=[0, 3],
        accumulate=[2],
    )
    figures, _ = measure(config)
    assert figures["grad_rel_diff"] <= 1e-5
    assert figures["loss_rel_diff"] <= 1e-4
    assert figures["resume_rel_diff"] <= 1e-4


def test_every_part_needs_a_network() -> None:
    with pytest.raises(ValueError, match="batch_size=7: every part"):
        StrategyParityConfig(num_workers=[4], accumulate=[2])
