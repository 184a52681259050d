"""The history of a run's workers, `workers.jsonl` in its folder: each start, each failure, each notice.

The first worker writes a row when all of them begin or go on; the process that watches them writes one when one fails.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from raywgen.inputs import parse_json
from raywgen.storage import Storage

WORKERS = "workers.jsonl"
_MAX_ROWS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The workers begin, or go on from a checkpoint.

    Attributes:
        time: Seconds since the epoch.
        launch: Name of the launch; one command is one launch.
        workers: Number of workers; 0 where the launching process trains alone.
        stage: Name of the stage that they go on with.
        step: Steps taken in it.
        reason: Why they were started, in words.
        places: Node, process and log of each worker, by rank, in words.
    """

    time: float
    launch: str
    workers: int
    stage: str
    step: int
    reason: str
    places: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """A worker failed, or its node is about to go.

    Attributes:
        time: Seconds since the epoch.
        reason: What happened, in words, with the rank and where it ran.
    """

    time: float
    reason: str


Event = Start | Trouble


def read_workers(out: str | Path) -> list[Event]:
    """Reads the history of a run's workers, oldest first; damaged rows are skipped."""
    storage = Storage.at(out)
    if storage.size(WORKERS) is None:
        return []
    events = (_event(line) for line in storage.read(WORKERS).decode(errors="replace").splitlines())
    return [event for event in events if event is not None]


def add_event(out: str | Path, event: Event) -> None:
    """Adds a row; the file is small and written anew, because object stores cannot append."""
    rows = [json.dumps(asdict(each)) for each in [*read_workers(out), event][-_MAX_ROWS:]]
    Storage.at(out).write(WORKERS, "".join(f"{row}\n" for row in rows).encode())


def add_start(out: str | Path, launch: str, workers: int, stage: str, step: int, places: Sequence[str]) -> None:
    """Adds the row of a start, with the reason for it as the rows before tell it."""
    reason = start_reason(read_workers(out), launch, workers)
    start = Start(
        time=time.time(),
        launch=launch,
        workers=workers,
        stage=stage,
        step=step,
        reason=reason,
        places=list(places),
    )
    add_event(out, start)


def add_trouble(out: str | Path, reason: str) -> None:
    """Adds the row of a failure or a notice."""
    add_event(out, Trouble(time=time.time(), reason=reason))


def start_reason(events: Sequence[Event], launch: str, workers: int) -> str:
    """Returns why workers were started, in words.

    Args:
        events: The history before this start.
        launch: Name of the launch.
        workers: Number of workers that were started.
    """
    places = [index for index, event in enumerate(events) if isinstance(event, Start)]
    if not places:
        return "the run began"
    before, since = events[places[-1]], events[places[-1] + 1 :]
    assert isinstance(before, Start)
    if before.launch != launch:
        return "the command was given again"
    if since:
        return since[0].reason
    if workers != before.workers:
        return f"there was room for {workers} workers instead of {before.workers}"
    return "the workers were started again"


def last_start(events: Sequence[Event]) -> Start | None:
    """Returns the newest start; None where there is none."""
    return next((event for event in reversed(events) if isinstance(event, Start)), None)


def _event(line: str) -> Event | None:
    try:
        row: dict[str, Any] = parse_json(line)
        kind = Start if "launch" in row else Trouble
        event = kind(**{each.name: row[each.name] for each in fields(kind)})
        is_sound = isinstance(event.time, int | float) and isinstance(event.reason, str)
        if isinstance(event, Start):
            is_sound &= isinstance(event.workers, int) and isinstance(event.step, int) and isinstance(event.stage, str)
            is_sound &= isinstance(event.places, list)
        return event if is_sound else None
    except (ValueError, KeyError, TypeError):
        return None
