from __future__ import annotations

import pytest

from raywgen.benchmarks.plan import CASES, PlanFiguresConfig, measure, worst


def test_the_worst_ratio_is_the_farthest_from_one_to_either_side() -> None:
    assert worst([1.1, 0.8, 1.2]) == 0.8
    assert worst([0.9, 1.2, 1.0]) == 1.2


def test_each_zero_stage_and_one_process_are_among_the_cases() -> None:
    settings = [" ".join(case.settings) for case in CASES.values()]
    assert all(any(f"zero_stage={stage}" in text for text in settings) for stage in range(4))
    assert any("num_workers=0" in text for text in settings)
    with pytest.raises(ValueError, match=r"cases=.*give some of local"):
        PlanFiguresConfig(cases=["zero-4"])


@pytest.mark.slow
def test_a_plan_is_compared_with_a_run() -> None:
    config = PlanFiguresConfig(cases=["local-windows"], network_values=100_000, measured_steps=6, num_steps=8)
    figures, conditions = measure(config)
    assert 0.5 < figures["bytes_ratio"] < 2
    assert figures["hours_ratio"] > 0
    assert conditions["cases"]["local-windows"]["peak_gib"] > 0.2
