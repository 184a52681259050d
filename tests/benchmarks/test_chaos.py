"""The faults of the benchmark `chaos`, on small runs."""

from __future__ import annotations

import json

import pytest

from raywgen.benchmarks.chaos_runs import Outcome, loss_difference
from raywgen.benchmarks.run import run
from raywgen.config import ConfigError

DAMAGES = 8  # Three of each of two files, a half-written one, and a storage that does not answer.


def test_a_run_that_lacks_a_step_is_lost() -> None:
    wanted = {("prior", 0): 2.0, ("prior", 1): -1.0}
    assert loss_difference({("prior", 0): 2.0, ("prior", 1): -1.0}, wanted) == 0.0
    assert loss_difference({("prior", 0): 2.0, ("prior", 1): -1.5}, wanted) == 0.5
    assert not Outcome("lost").with_losses(loss_difference({("prior", 0): 2.0}, wanted)).survived


def test_unknown_faults_are_refused() -> None:
    with pytest.raises(ConfigError, match="'worker kiled' is none of worker killed, "):
        run(["chaos", "faults=[worker kiled]"])


@pytest.mark.slow
def test_kills_and_damages_in_processes_and_faults_on_a_cluster() -> None:
    faults = ["node removed", "node's end announced, node removed", "driver killed, command given again"]
    figures = run(["chaos", "method=hypernetwork", "kills=2", f"faults={json.dumps(faults)}"])["figures"]
    assert figures["faults"] == figures["survived"] == 2 + DAMAGES + 1 + 3
    assert figures["loss_diff"] == 0.0
    assert figures["lost_steps"] <= figures["interval"]
