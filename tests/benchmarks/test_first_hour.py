from __future__ import annotations

import sys
from pathlib import Path

import pytest

from raywgen.benchmarks.first_hour import FirstHourConfig, WrongAnswerError, cpu_seconds, measure


def test_it_times_four_processes_and_counts_files(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    (tmp_path / "same").hardlink_to(tmp_path / "file")
    figures, conditions = measure(FirstHourConfig(repeats=1, environment=str(tmp_path)))
    assert set(figures) == {
        "help_cpu_s",
        "status_cpu_s",
        "import_cpu_s",
        "error_cpu_s",
        "package_mib",
        "environment_mib",
    }
    assert figures["environment_mib"] == 1.0
    assert all(value > 0 for value in figures.values())
    assert conditions["repeats"] == 1


@pytest.mark.parametrize(("code", "status", "said"), [("print(1)", 1, "1"), ("print(1)", 0, "2")])
def test_a_process_that_did_something_else_does_not_count(code: str, status: int, said: str) -> None:
    with pytest.raises(WrongAnswerError, match="ended with status 0 and printed: 1"):
        cpu_seconds([sys.executable, "-c", code], status, said)
