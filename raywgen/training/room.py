"""Notices that a cluster has no room for a run's workers, or has lost it; Ray Train would wait for ever."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence

from raywgen.training.config import TrainConfig
from raywgen.training.resource_check import Resources, describe, first_unplaceable, worker_request

NO_ROOM = "the cluster has had no room for "
"""Begins the reason of a run that was ended for lack of room."""
_POLL_SECONDS = 5.0


def missing_room(config: TrainConfig, nodes: Sequence[Resources]) -> str | None:
    """Returns in words what is missing if a run's fewest workers cannot be placed on nodes that run nothing else.

    Args:
        config: The run.
        nodes: The resources of each node.
    """
    request = worker_request(config)
    if first_unplaceable([request] * config.min_workers, nodes) is None:
        return None
    workers = "1 worker" if config.min_workers == 1 else f"{config.min_workers} workers"
    each = f"{workers} with 1 {next(iter(request))} each"
    return f"{NO_ROOM}{each} for {config.room_timeout:g} s: it has {describe(nodes)}"


def remedy(config: TrainConfig) -> str:
    """Says how a run that has lost its room goes on."""
    fewer = f", or num_workers=[1,{config.max_workers}] goes on with fewer workers" if config.min_workers > 1 else ""
    return f"the same command goes on from the last checkpoint when there is room{fewer}"


def watch_room(config: TrainConfig, nodes: Callable[[], Sequence[Resources]], end: Callable[[str], None]) -> None:
    """Starts a thread that calls `end` with the reason when there has been no room for `room_timeout` without a break.

    Args:
        config: The run.
        nodes: Returns the resources of each node that is alive.
        end: Ends the run.
    """

    def watch() -> None:
        since: float | None = None
        while True:
            reason = missing_room(config, nodes())
            if reason is None:
                since = None
            elif since is None:
                since = time.monotonic()
            elif time.monotonic() - since >= config.room_timeout:
                end(reason)
                return
            time.sleep(min(_POLL_SECONDS, config.room_timeout / 4))

    threading.Thread(target=watch, name="raywgen-room", daemon=True).start()


def await_room(
    config: TrainConfig,
    nodes: Callable[[], Sequence[Resources]],
    ask: Callable[[list[Resources]], None],
) -> str | None:
    """Waits for the nodes of a run that begins, and returns what is missing where there is no room in `room_timeout`.

    Args:
        config: The run.
        nodes: Returns the resources of each node that is alive.
        ask: Asks an autoscaler for room for resources in all; an empty list asks for nothing more.
    """
    begin = time.monotonic()
    if missing_room(config, nodes()) is None:
        return None
    print(f"{config.out} waits up to {config.room_timeout:g} s for nodes for its workers", file=sys.stderr, flush=True)
    ask([worker_request(config)] * config.min_workers)
    try:
        while (reason := missing_room(config, nodes())) is not None:
            if time.monotonic() - begin >= config.room_timeout:
                return reason
            time.sleep(min(_POLL_SECONDS, config.room_timeout / 4))
        return None
    finally:
        ask([])


def ask_autoscaler(requests: list[Resources]) -> None:
    """Asks the autoscaler of the connected cluster, if it has one, for room for resources in all."""
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[dict(request) for request in requests])


def alive_nodes() -> list[Resources]:
    """Returns the resources of each node of the connected cluster."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
