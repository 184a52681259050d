"""Rates are those of the steps alone, over all workers, and log rows hold them beside the metrics."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from raywgen.corpus import Corpus
from raywgen.generators import Stage
from raywgen.training import launch, read_metrics, step_meter
from raywgen.training.device_peaks import named_peak
from raywgen.training.engine import LocalEngine
from raywgen.training.step_meter import StepMeter
from tests.builders import igpg, noise_for, tokenizer_stage, weight_batch
from tests.training.test_resume import small_config


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(step_meter, "time", clock)
    return clock


def prior_stage() -> Stage:
    return next(stage for stage in igpg().all_stages() if stage.name == "prior")


def take_step(meter: StepMeter, clock: Clock, part: int) -> None:
    """A step of 2 s on a part of a batch, half a second of which is waiting."""
    with meter.waiting():
        clock.now += 0.5
    with meter.step(weight_batch(num=part)):
        clock.now += 1.5
    clock.now += 100.0  # Validation, logging, saving.


def test_rates_count_the_networks_of_all_workers(clock: Clock) -> None:
    stage, batch = prior_stage(), weight_batch(num=2)
    meter = StepMeter(LocalEngine(stage))
    for part in (2, 1):
        take_step(meter, clock, part)
    figures, num = meter.figures(), stage.config.batch_size
    assert figures["seconds_per_step"] == pytest.approx(2.0)
    assert figures["input_wait"] == pytest.approx(0.25)
    assert figures["values_per_second"] == pytest.approx(num * batch.layout.num_values / 2)
    assert figures["tokens_per_second"] == pytest.approx(num * stage.num_tokens(batch) / 2 / 2)
    assert 0 < figures["anon_gib"] < 100
    assert "mfu" not in figures
    assert meter.figures().keys() == {"anon_gib"}, "rates begin anew after each row"


def test_a_prior_counts_the_tokens_that_it_sees() -> None:
    generator = igpg()
    stage, batch = prior_stage(), weight_batch(num=2)
    codes = tokenizer_stage(generator).tokenizer.table(batch.layout).positions_MG
    num_levels = generator.config.tokenizer.quantiser.num_levels
    assert stage.num_tokens(batch) == 2 * len(codes) * num_levels
    assert tokenizer_stage(generator).num_tokens(batch) == 0


def test_states_of_trajectories_count_as_values(clock: Clock) -> None:
    stage, batch = prior_stage(), weight_batch(num=2)
    batch = replace(batch, targets_BAD=torch.zeros(2, 3, batch.layout.num_values))
    meter = StepMeter(LocalEngine(stage))
    with meter.step(batch):
        clock.now += 1.0
    expected = stage.config.batch_size * 3 * batch.layout.num_values
    assert meter.figures()["values_per_second"] == pytest.approx(expected)


def test_utilisation_is_the_share_of_a_known_peak(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_meter, "peak_flops", lambda device, precision: 1e6)
    model = torch.nn.Linear(30, 20)
    stage, batch = prior_stage(), weight_batch(num=2)
    meter = StepMeter(LocalEngine(stage))
    with meter.waiting():
        clock.now += 7.0
    with meter.step(batch):  # The step whose operations are counted; it is slow, and its time does not count.
        model(torch.ones(4, 30))
        clock.now += 9.0
    with meter.step(batch):
        clock.now += 2.0
    figures = meter.figures()
    flops = 2 * 4 * 30 * 20 * stage.config.batch_size / 2
    assert figures["mfu"] == pytest.approx(flops / 2 / 1e6)
    assert figures["input_wait"] == 0
    assert figures["seconds_per_step"] == pytest.approx(2.0)


def test_counting_operations_changes_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = []
    for peak in (None, 1e12):
        monkeypatch.setattr(step_meter, "peak_flops", lambda device, precision, peak=peak: peak)
        engine = LocalEngine(prior_stage())
        meter = StepMeter(engine)
        for step in range(2):
            batch = weight_batch(num=4, seed=step)
            with meter.step(batch):
                losses.append(float(engine.train_step(batch, noise_for(4), 1e-2)["loss"]))
    assert losses[:2] == losses[2:]
    assert meter.figures()["mfu"] > 0


def test_peaks_are_found_by_the_names_of_devices() -> None:
    assert named_peak("NVIDIA H100 80GB HBM3", "bf16") == 989.4e12
    assert named_peak("NVIDIA H100 PCIe", "bf16") == 756e12
    assert named_peak("NVIDIA A100-SXM4-80GB", "fp32") == 19.5e12
    assert named_peak("NVIDIA L40S", "bf16") == 362e12
    assert named_peak("NVIDIA GeForce RTX 4090", "fp32") == 82.6e12
    assert named_peak("NVIDIA L40", "bf16") is None
    assert named_peak("Tesla K80", "fp32") is None


def test_rows_of_a_run_hold_its_speed(zoo_corpus: Corpus, tmp_path: Path) -> None:
    launch([small_config(zoo_corpus, tmp_path)])
    rows = read_metrics(tmp_path)
    assert all(row["perf"]["values_per_second"] > 0 and 0 <= row["perf"]["input_wait"] <= 1 for row in rows)
    assert {row["stage"] for row in rows if "tokens_per_second" in row["perf"]} == {"prior"}
