"""The strategy that is chosen from sizes, and the sizes that a stage is found to have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from raywgen.benchmarks.strategy_cases import CASES, batch_of, build_stage, noise_of
from raywgen.nn.blocks import prepare_blocks
from raywgen.nn.memory import free_memory, host_memory
from raywgen.training.engine import EngineSettings
from raywgen.training.strategy import (
    StageSizes,
    StrategyError,
    buffer_bytes,
    choose_strategy,
    state_bytes,
    suited_settings,
)

GIB = 1 << 30
# In 16 workers: 16 GiB of states unsharded, 9 under ZeRO-1, 5 under ZeRO-2, 1.25 under ZeRO-3.
SIZES = StageSizes(num_parameters=GIB, activation_bytes=GIB // 100, batch_size=64)


@pytest.mark.parametrize(
    ("memory", "zero_stage"), [(20.0, 0), (11.0, 1), (6.5, 2), (1.6, 3)], ids=["plenty", "less", "little", "least"]
)
def test_no_more_is_sharded_than_must_be(memory: float, zero_stage: int) -> None:
    strategy = choose_strategy(SIZES, 16, int(memory * GIB), can_offload=False)
    assert (strategy.zero_stage, strategy.offload, strategy.accumulate) == (zero_stage, "none", 1)
    assert "1.07e+03 M parameters" in strategy.reason


def test_activations_that_do_not_fit_are_computed_in_parts() -> None:
    sizes = replace(SIZES, activation_bytes=GIB)
    # 17 GiB less 16 GiB of states leave one network at a time; a few parts cost less than to shard would save.
    strategy = choose_strategy(sizes, 16, 20 * GIB, can_offload=False)
    assert (strategy.zero_stage, strategy.accumulate) == (0, 4)
    # Many parts cost more than that.
    strategy = choose_strategy(replace(sizes, batch_size=256), 16, 20 * GIB, can_offload=False)
    assert (strategy.zero_stage, strategy.accumulate) == (1, 2)


def test_what_fits_nowhere_else_is_kept_in_the_host() -> None:
    memory = int(1.4 * GIB)
    strategy = choose_strategy(SIZES, 16, memory, can_offload=True)
    assert (strategy.zero_stage, strategy.offload) == (3, "optimizer")
    with pytest.raises(StrategyError, match=r"need 1.26 GiB of a worker, which has 1.4 GiB: give more workers"):
        choose_strategy(SIZES, 16, memory, can_offload=False)
    with pytest.raises(StrategyError, match=r"need 5\.01 GiB"):
        choose_strategy(SIZES, 16, memory, can_offload=False, max_zero_stage=2)


def test_one_process_has_parts_alone() -> None:
    strategy = choose_strategy(replace(SIZES, activation_bytes=GIB), 0, 40 * GIB, can_offload=True)
    assert (strategy.zero_stage, strategy.offload, strategy.accumulate) == (0, "none", 4)


def test_a_stage_that_gathers_all_and_averages_need_more() -> None:
    assert state_bytes(replace(SIZES, gathers_all=True), 4, 3, "none") == state_bytes(SIZES, 4, 3, "none") + 4 * GIB
    assert state_bytes(replace(SIZES, has_averages=True), 4, 1, "none") == state_bytes(SIZES, 4, 1, "none") + 4 * GIB
    assert state_bytes(replace(SIZES, has_averages=True), 4, 3, "parameters") == GIB


def test_buckets_are_bounded_but_for_a_larger_parameter() -> None:
    sizes = [replace(SIZES, num_parameters=P) for P in (1_000_000, 100_000_000, 200_000_000)]
    small, large, larger = (buffer_bytes(each, 2, 1) for each in sizes)
    assert small == (4 + 12 // 2) * 1_000_000
    assert larger - large == 12 // 2 * 100_000_000
    assert buffer_bytes(replace(sizes[1], num_largest=30_000_000), 2, 1) - large == 4 * 20_000_000


def test_sizes_are_those_of_one_network_and_measuring_learns_nothing() -> None:
    case = CASES["igpg-prior"]
    stage = build_stage(case, 6)
    before = {name: tensor.clone() for name, tensor in stage.state_dict().items()}
    batch = batch_of(case, 0, 6)
    sizes = [
        StageSizes.measure(stage, [(part, noise_of(part))]).activation_bytes
        for part in (batch.first(1), batch.first(3))
    ]
    assert sizes[0] > 0
    assert sizes[1] == pytest.approx(3 * sizes[0], rel=0.5)
    prepare_blocks(stage, recompute=True, compiled=False)
    part = batch.first(1)
    assert StageSizes.measure(stage, [(part, noise_of(part))]).activation_bytes < sizes[0] / 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in stage.state_dict().items())
    assert all(parameter.grad is None for parameter in stage.parameters())


def test_settings_that_do_not_concern_the_strategy_stay() -> None:
    case = CASES["direct-regression"]
    part = batch_of(case, 0, 1)
    given = EngineSettings(precision="bf16", accumulate=3, zero_stage=2)
    settings, reason = suited_settings(given, build_stage(case, 6), [(part, noise_of(part))], 2, GIB, False)
    assert settings == replace(given, accumulate=1, zero_stage=0)
    assert reason.startswith("zero_stage=0, offload=none, accumulate=1, because ")


def test_the_memory_of_a_host_is_bounded_by_its_control_group(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  9000 kB\nMemAvailable:    4000 kB\n")
    assert host_memory(meminfo, tmp_path) == 4000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory(meminfo, tmp_path) == 4000 * 1024
    (tmp_path / "memory.max").write_text("2000\n")
    (tmp_path / "memory.current").write_text("1500\n")
    (tmp_path / "memory.stat").write_text("anon 900\ninactive_file 400\n")
    assert host_memory(meminfo, tmp_path) == 900
    assert 0 < free_memory(torch.device("cpu"), 4) <= host_memory() // 2
