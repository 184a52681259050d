"""Memory is measured in processes of their own, at sizes that say nothing of large ones."""

from __future__ import annotations

import mmap
import time
from pathlib import Path

import pytest

from raywgen.benchmarks.memory_peak import memory_peak
from raywgen.benchmarks.train_memory import TrainMemoryConfig, measure


def test_the_peak_of_memory_is_seen_after_it_is_given_back() -> None:
    size = 64 << 20
    with memory_peak() as peak:
        before = peak()
        # Pages of its own, as an allocator might use some that it holds already.
        with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
            held.write(bytes(size))
            for _ in range(1000):
                if peak() - before >= size:
                    break
                time.sleep(0.01)
        assert peak() - before >= size
    assert before > 0


@pytest.mark.slow
def test_every_figure_is_there_and_a_small_network_takes_little(tmp_path: Path) -> None:
    small = {"methods": ["tokenizer"], "num_networks": [2, 4], "network_values": 100_000, "sizes": [100_000, 400_000]}
    figures, conditions = measure(TrainMemoryConfig(**small, repeats=1, rounds=2, folder=str(tmp_path)))
    slopes = {f"{part}_slope_{name}" for part in ("worker", "driver") for name in ("n", "d")}
    assert figures.keys() == slopes | {"peak_anon_gib", "step_over_small", "bundle_bytes_per_value"}
    assert 0 < figures["peak_anon_gib"] < 2
    assert abs(figures["bundle_bytes_per_value"]) < 0.001
    assert all(peak > 0 for peak in conditions["peak_gib"]["tokenizer"]["worker_n"])
