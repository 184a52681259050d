"""Memory is measured in processes of their own, at sizes that say nothing of large ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from raywgen.benchmarks.train_memory import TrainMemoryConfig, measure

_PEAK = """
import time
from raywgen.benchmarks.memory_peak import memory_peak
size = 64 << 20
with memory_peak() as peak:
    before = peak()
    held = bytearray(b"1") * size
    time.sleep(0.5)
    del held
    assert before > 0
    assert peak() - before >= size, (before, peak())
"""


def test_the_peak_of_memory_is_seen_after_it_is_given_back() -> None:
    """In a process of its own: this one may give back what earlier tests have used, at any moment."""
    subprocess.run([sys.executable, "-c", _PEAK], check=True)


@pytest.mark.slow
def test_every_figure_is_there_and_no_memory_grows_with_networks_whose_scales_are_tokens(tmp_path: Path) -> None:
    """Steps on whole networks would take tens of bytes for each further byte of a network."""
    sizes = {"sizes": [1_000_000, 16_000_000], "networks_of_a_size": 2}
    small = {"methods": ["scales"], "num_networks": [2, 3], "network_values": 100_000} | sizes
    figures, conditions = measure(TrainMemoryConfig(**small, repeats=1, rounds=2, folder=str(tmp_path)))
    slopes = {f"{part}_slope_{name}" for part in ("worker", "driver") for name in ("n", "d")}
    assert figures.keys() == slopes | {"peak_anon_gib", "step_over_small", "bundle_bytes_per_value", "sources_equal"}
    assert 0 < figures["peak_anon_gib"] < 2
    assert figures["sources_equal"] == 1
    assert abs(figures["bundle_bytes_per_value"]) < 0.001
    assert all(peak > 0 for peak in conditions["peak_gib"]["scales"]["worker_n"])
    assert figures["worker_slope_d"] < 1
