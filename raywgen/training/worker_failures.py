"""The words and the history of failures of Ray Train's workers, and the bounds of what these may wait for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ray.train import UserCallback
from torch.distributed import DistError

from raywgen.compat import lost_worker
from raywgen.training.config import TrainConfig
from raywgen.training.room import NO_ROOM, alive_nodes, watch_room
from raywgen.training.run_folder import is_done
from raywgen.training.workers_log import Trouble, add_trouble, last_start, read_workers

if TYPE_CHECKING:
    from ray.train import Checkpoint

_SECONDS = (
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S",
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S",
)
_CUT_OFF = ("connection", "timed out", "timeout", "peer", "socket", "broken pipe", "nccl")


@contextmanager
def worker_timeouts(seconds: float) -> Iterator[None]:
    """Bounds what Ray Train's workers may keep each other waiting; what the user's environment sets stays.

    Ray Train reads its bounds from the environment of the process that calls `fit`.
    """
    added = [name for name in _SECONDS if name not in os.environ]
    os.environ |= dict.fromkeys(added, f"{seconds:g}")
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


class FailureLog(UserCallback):
    """Keeps each failure of workers in the history of the run under way, and ends runs that have lost their room.

    Ray Train calls it in the process of its controller, an actor.

    Args:
        outs: Run folders of the launch, in the order in which they are trained.
        config: The first of the runs.
    """

    def __init__(self, outs: Sequence[str], config: TrainConfig) -> None:
        self._outs, self._config = list(outs), config
        self._is_watching = False

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        """Does nothing: raywgen keeps its own checkpoints."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Adds the failure that explains the others, and looks from then on whether there is room for the workers."""
        out = under_way(self._outs)
        add_trouble(out, failure_text(worker_exceptions, places_of(out), self._config.worker_timeout))
        self.watch()

    def watch(self) -> None:
        """Watches the room of the cluster, and ends the actor that this is called in when the room is lost."""
        import ray

        if self._is_watching or not ray.is_initialized() or ray.get_runtime_context().get_actor_id() is None:
            return
        self._is_watching, controller = True, ray.get_runtime_context().current_actor

        def end(reason: str) -> None:
            add_trouble(under_way(self._outs), reason)
            ray.kill(controller)

        watch_room(self._config, alive_nodes, end)


def under_way(outs: Sequence[str]) -> str:
    """Returns the folder of the first of a launch's runs that is not done."""
    return next((out for out in outs if not is_done(out)), outs[-1])


def lost_room(outs: Sequence[str]) -> str | None:
    """Returns why the run under way was ended if it was for lack of room."""
    newest = next(reversed(read_workers(under_way(outs))), None)
    is_lost = isinstance(newest, Trouble) and newest.reason.startswith(NO_ROOM)
    return newest.reason if newest is not None and is_lost else None


def places_of(out: str) -> list[str]:
    """Returns where the workers of a run were started last, by rank, in words."""
    start = last_start(read_workers(out))
    return [] if start is None else start.places


def failure_text(failures: Mapping[int, Exception], places: Sequence[str], timeout: float) -> str:
    """Returns in words what went wrong with which rank, and where it ran.

    If one worker dies or hangs, the others fail too because they lose it; the text is about the one that explains
    the others.

    Args:
        failures: The error of each rank that has one.
        places: Where each rank runs, see `Start`.
        timeout: Seconds after which a worker that does not answer counts as hung.
    """
    rank = min(failures, key=lambda rank: (_weight(failures[rank]), rank))
    error = failures[rank]
    lines = str(error).strip().splitlines()
    verb = "lost another worker" if is_cut_off(error) else "failed"
    what = {
        "died": "died",
        "hung": f"did not answer for {timeout:g} s",
        None: f"{verb}: {type(error).__name__}: {lines[-1] if lines else 'it gives no reason'}",
    }[lost_worker(error)]
    where = f" ({places[rank]})" if rank < len(places) else ""
    return f"rank {rank}{where} {what}"


def _weight(error: Exception) -> int:
    """Returns 0 for an error that stands for itself, more the likelier another worker's failure has caused it."""
    if lost_worker(error) is not None:
        return 0
    return 2 if is_cut_off(error) else 1


def is_cut_off(error: BaseException) -> bool:
    """Whether an error of the training loop says that another worker does not answer any more."""
    is_of_torch = type(error) is RuntimeError or isinstance(error, DistError)
    return is_of_torch and any(word in str(error).lower() for word in _CUT_OFF)
