"""The checkpoints of a run folder by their names, which say how far the run is; none of them is opened."""

from __future__ import annotations

import re

from raywgen.storage import Storage
from raywgen.training.checkpoints.index import INDEX

CHECKPOINTS = "checkpoints"
_NAME = re.compile(r"(\d+)-(\d+)")


def checkpoint_names(storage: Storage) -> list[str]:
    """Returns the names of the checkpoints of a run folder, also of those that are half written, oldest first."""
    found = {path.split("/")[1] for path in storage.walk(CHECKPOINTS) if path.count("/") > 1}
    return sorted(name for name in found if _NAME.fullmatch(name))


def newest_position(storage: Storage) -> tuple[int, int] | None:
    """Returns stage and step of the newest durable checkpoint of a run folder, by its name alone."""
    for name in reversed(checkpoint_names(storage)):
        if storage.size(f"{CHECKPOINTS}/{name}/{INDEX}") is not None:
            return position_of(name)
    return None


def position_of(name: str) -> tuple[int, int]:
    """Returns stage and step of a checkpoint by the name of its folder."""
    stage, _, step = name.partition("-")
    return int(stage), int(step)
