from __future__ import annotations

import io

import pytest
from rich.console import Console

from raywgen import progress
from raywgen.progress import Reporter


def lines_of(updates: list[tuple[float, int]], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a log shows of a step, given the seconds and the number done at each update of 100."""
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    text = io.StringIO()
    with Reporter(Console(file=text, width=200)).step("train", "a thing") as bar:
        for seconds, done in updates:
            now = seconds
            bar.update(done, 100)
    return [line.strip() for line in text.getvalue().splitlines()[1:-1]]


def test_lines_tell_the_time_left_at_the_rate_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = lines_of([(0, 0), (20, 10), (40, 20), (300, 50)], monkeypatch)
    assert lines == [
        "10/100, 0.5/s, about 3 min left",
        "20/100, 0.5/s, about 3 min left",
        "50/100, 0.167/s, about 5 min left",
    ]


def test_what_was_done_before_says_nothing_of_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines_of([(0, 80), (20, 90), (41, 100)], monkeypatch) == [
        "90/100, 0.5/s, about 20 s left",
        "100/100, 0.488/s",
    ]


def test_another_total_is_that_of_other_work_with_its_own_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now, text = 0.0, io.StringIO()
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with Reporter(Console(file=text, width=200)).step("zoo", "networks") as bar:
        for seconds, done, total in ((0, 10, 60), (20, 20, 60), (40, 0, 900), (60, 300, 900)):
            now = seconds
            bar.update(done, total)
    assert [line.strip() for line in text.getvalue().splitlines()[1:-1]] == [
        "20/60, 0.5/s, about 80 s left",
        "0/900",
        "300/900, 15/s, about 40 s left",
    ]


def test_no_remaining_time_is_shown_without_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines_of([(20, 10), (40, 10), (60, 5)], monkeypatch) == ["10/100", "10/100", "5/100"]


def test_a_row_of_a_run_is_shown_with_its_rates() -> None:
    text = io.StringIO()
    perf = {"values_per_second": 2.5e9, "tokens_per_second": 812.0, "mfu": 0.31, "input_wait": 0.004, "gpu_peak_gib": 9}
    with Reporter(Console(file=text, width=200)).step("train", "a thing") as bar:
        bar.training("runs/igpg", "prior", 30, 30, {"loss": 0.5, "perf": perf})
        bar.training("runs/igpg", "prior", 30, 30, {"loss": 0.5})
    assert [line.strip() for line in text.getvalue().splitlines()[1:-1]] == [
        "igpg prior 30/30 loss 0.500; 2.5G values/s, 812 tokens/s, MFU 31%, 0% waiting for input, 9.0 GiB of the GPU",
        "igpg prior 30/30 loss 0.500",
    ]


def test_each_stage_of_a_run_has_a_time_left_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    now, text = 0.0, io.StringIO()
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with Reporter(Console(file=text, width=200)).step("train", "a thing") as bar:
        for seconds, stage, step in ((0, "tokenizer", 0), (20, "tokenizer", 50), (40, "prior", 10), (60, "prior", 20)):
            now = seconds
            bar.training("runs/igpg", stage, step, 100, {})
        now = 80
        bar.named(30, 100, "more")
    assert [line.strip() for line in text.getvalue().splitlines()[1:-1]] == [
        "igpg tokenizer 50/100, about 20 s left",
        "igpg prior 10/100",
        "igpg prior 20/100, about 3 min left",
        "more, about 2 min left",
    ]
