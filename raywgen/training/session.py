"""A Ray session for a command: the cluster that is there, or one of its own on this machine."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from raywgen.ray_address import ClusterError, check_address


@contextmanager
def ray_session(spare: int = 1, *, dashboard: bool = False) -> Iterator[None]:
    """Connects to the cluster of `RAY_ADDRESS`, else starts Ray here and stops it afterwards.

    A session that is there already, as in tests, is used and left running.

    Args:
        spare: Logical CPUs beyond those of this machine, for what mostly waits.
        dashboard: Start Ray's dashboard, whose state API cleans up after training workers that were stopped.

    Raises:
        ClusterError: Nobody answers at `RAY_ADDRESS`, the cluster refuses the token, or Ray could not be started.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    import ray

    if ray.is_initialized():
        yield
        return
    handlers = _handlers()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if address := os.environ.get("RAY_ADDRESS"):
            check_address(address)
            with _said(f"cannot join the Ray cluster of RAY_ADDRESS={address}"):
                ray.init(logging_level=logging.ERROR)
        else:
            with _said("Ray could not be started on this machine"):
                ray.init(
                    address="local",
                    num_cpus=num_local_cpus(spare),
                    include_dashboard=dashboard,
                    logging_level=logging.ERROR,
                    log_to_driver=False,
                )
    for number, handler in handlers.items():
        signal.signal(number, handler)  # Ray puts its own in their place, which end the process without a word.
    quieten_ray_data()
    try:
        yield
    finally:
        ray.shutdown()


def num_local_cpus(spare: int = 1) -> int:
    """Returns the logical CPUs of a Ray that is started on this machine.

    Args:
        spare: Those beyond the machine's own, for what mostly waits.
    """
    # Two at least: two workers on one core are slow, but none would wait forever.
    return max(2, os.cpu_count() or 1) + spare


@contextmanager
def _said(what: str) -> Iterator[None]:
    """Ray's own failure to start in one line; it raises plain exceptions, of which the first line tells the cause."""
    try:
        yield
    except AssertionError:
        raise
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ClusterError(
            f"{what} ({reason}); see that memory, disk space in {tempfile.gettempdir()} and processes are left, and "
            "its newest logs in ray/session_latest/logs there"
        ) from error


def _handlers() -> dict[int, Any]:
    """Returns the handlers of SIGINT and SIGTERM, as far as they can be set again."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    return {number: handler for number, handler in found.items() if callable(handler)}


def quieten_ray_data() -> None:
    """Keeps Ray Data and Ray Train from writing of what goes well."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
