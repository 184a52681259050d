"""Steps without values against the same steps with values: what they take must be the same."""

from __future__ import annotations

import pytest
import torch

from raywgen.benchmarks.strategy_cases import CASES, batch_of, build_stage, noise_of
from raywgen.generators import Stage
from raywgen.training.live_bytes import LiveBytes
from raywgen.training.plan.valueless import valueless
from raywgen.weights import KeyedNoise, WeightBatch
from raywgen.weights.chunks import position_features

# What is told from values is guessed: the codes of padding, and which networks have independent chunks.
_SLACK = {"igpg-tokenizer": 1.1, "igpg-tokenizer-live": 1.1, "igpg-prior-alone": 1.5}


def peak(stage: Stage, batch: WeightBatch, noise: KeyedNoise) -> int:
    stage.train()
    with LiveBytes() as live:
        stage(stage.see(batch, noise), noise).loss.backward()
    return live.peak


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", CASES)
def test_a_step_without_values_takes_what_one_with_values_does(name: str) -> None:
    case = CASES[name]
    batch = batch_of(case, 0, 4)
    expected = peak(build_stage(case, 4), batch, noise_of(batch))
    with valueless():
        found = peak(build_stage(case, 4), batch_of(case, 0, 4), noise_of(batch))
    assert 0.99 * expected <= found <= _SLACK.get(name, 1.05) * expected


def test_no_table_without_values_is_left_behind() -> None:
    layout = batch_of(CASES["igpg-prior"], 0, 1).layout
    expected = position_features(layout, 8).clone()
    with valueless():
        position_features(layout, 8)
    assert torch.equal(position_features(layout, 8), expected)
