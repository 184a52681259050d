"""`stages.json`: the training stages of a run, which the run writes when it begins.

Whoever needs to know them (status, tuning) reads this file, and no attribute of the method's config.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raywgen.config import ConfigError
from raywgen.inputs import MAX_JSON_BYTES, parse_json
from raywgen.locations import joined
from raywgen.storage import Storage, read_file

if TYPE_CHECKING:
    from raywgen.generators import Stage

STAGES_FILE = "stages.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRecord:
    """One training stage of a run.

    Attributes:
        name: Name of the stage, as in the metric log.
        num_steps: Optimiser steps.
        batch_size: Networks of a step, over all workers.
        optimizer: Its optimiser settings by name.
        is_optional: Whether `num_steps=0` leaves it out.
    """

    name: str
    num_steps: int
    batch_size: int
    optimizer: dict[str, Any]
    is_optional: bool


def stage_records(stages: Sequence[Stage]) -> list[StageRecord]:
    """Describes the stages of a generator, in order."""
    return [
        StageRecord(
            name=stage.name,
            num_steps=stage.config.num_steps,
            batch_size=stage.config.batch_size,
            optimizer=asdict(stage.config.optimizer),
            is_optional=stage.is_optional,
        )
        for stage in stages
    ]


def write_stages(records: Sequence[StageRecord], out: str | Path) -> None:
    """Writes `stages.json` into a run folder."""
    stages = [asdict(record) for record in records]
    Storage.at(out).write(STAGES_FILE, (json.dumps({"stages": stages}, indent=1) + "\n").encode())


def read_stages(out: str | Path) -> list[StageRecord]:
    """The stages of a run, in order.

    Raises:
        ConfigError: The file is missing or damaged; the message names the remedy.
    """
    path = joined(out, STAGES_FILE)
    try:
        # Files of earlier versions hold further keys.
        known = [field.name for field in fields(StageRecord)]
        stages = parse_json(read_file(path, MAX_JSON_BYTES))["stages"]
        records = [StageRecord(**{name: record[name] for name in known}) for record in stages]
        if not all(isinstance(record.name, str) and isinstance(record.num_steps, int) for record in records):
            raise TypeError("a value of another type")
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = "missing" if isinstance(error, FileNotFoundError) else f"damaged ({error})"
        raise ConfigError(f"{path} is {reason}; give the command that began this run again, which writes it") from error
    return records
