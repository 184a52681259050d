"""A run with a range of workers on a real cluster of three nodes, which loses nodes and gets new ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from raywgen.benchmarks.chaos_cluster_faults import ELASTIC_FAULTS, FAULTS, break_on_cluster
from raywgen.benchmarks.chaos_processes import undisturbed
from raywgen.benchmarks.chaos_runs import RunView, run_config
from raywgen.corpus import Corpus
from raywgen.training.status import run_status

pytestmark = pytest.mark.slow
INTERVAL = 10


def test_workers_hang_go_and_come_and_losses_stay(zoo_corpus: Corpus, tmp_path: Path, one_thread: None) -> None:
    faults = [next(fault for fault in FAULTS if fault.name == "rank hangs"), *ELASTIC_FAULTS]
    settings = {"checkpoint_every": INTERVAL, "max_failures": 9, "worker_timeout": 15.0, "resize_seconds": 5.0}
    run = run_config("igpg", zoo_corpus.location, tmp_path / "run", 800, num_workers=[1, 3], **settings)
    calm = run_config("igpg", zoo_corpus.location, tmp_path / "calm", 800, num_workers=0)
    outcomes = break_on_cluster([run], [faults], {run.out: undisturbed(calm, 0)}, seed=0)
    assert [outcome.name for outcome in outcomes] == ["rank hangs", "scale 3 to 1", "scale 1 to 3"]
    assert all(outcome.difference < 1e-5 for outcome in outcomes), outcomes
    assert all(outcome.lost_steps <= INTERVAL for outcome in outcomes[:2]), outcomes
    hung, _, grown = RunView(tmp_path / "run").starts()[-3:]
    assert "did not answer for 15 s" in hung.reason
    assert "log /" in hung.reason
    assert grown.reason == "there was room for 3 workers instead of 1"
    assert any("there was room for 3 workers" in line for line in run_status(tmp_path / "run").lines())
