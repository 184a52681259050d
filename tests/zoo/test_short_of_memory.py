"""Ray's own memory monitor kills every worker: the end is an error that says so, not a wait without end."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from raywgen.actor_pool import ActorsLostError, OnShare
from raywgen.zoo.task_pool import run_over_ray

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def ray_session() -> Iterator[None]:
    """To this monitor any machine is full."""
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        _system_config={"memory_usage_threshold": 0.001, "memory_monitor_refresh_ms": 100},
    )
    yield
    ray.shutdown()


def test_units_killed_for_memory_are_given_up() -> None:
    def rest(seconds: float, on_share: OnShare) -> None:
        time.sleep(seconds)

    news: list[str] = []
    with pytest.raises(ActorsLostError, match=r"given up: each of its 4 workers was killed, as its node ran out of"):
        list(run_over_ray(rest, [60.0, 61.0, 62.0], str, news.append))
    assert any("ran out of memory; tried again" in line for line in news)
