"""The metrics of a run: a JSONL log, and scalars for TensorBoard."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raywgen.files import write_text
from raywgen.inputs import MAX_JSON_BYTES, parse_json
from raywgen.locations import joined
from raywgen.mirror import Mirror
from raywgen.storage import Storage, read_file

Row = dict[str, Any]
"""One row of the log: `stage`, `step`, `time` in seconds since the run began, the metrics of the step, and below `perf`
the figures of `StepMeter`, which differ from run to run. Logs of older versions have no `perf`."""
PERF = "perf"
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"


class RunLog:
    """Appends metrics to the log of a run folder; only one worker may hold it.

    The log of a folder in an object store is written locally, and copied there every few seconds.

    Args:
        folder: The run folder, a local path or a URI.
        resumed: Stage name -> first step that will be written again. Its rows from there on are dropped, and so are
            all rows of stages that are not named.
    """

    def __init__(self, folder: str | Path, resumed: Mapping[str, float]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        storage = Storage.at(folder)
        self._mirror = None if storage.is_local else Mirror(Path(tempfile.mkdtemp(prefix="raywgen-log-")), storage)
        place = Path(storage.root) if self._mirror is None else self._mirror.folder
        self._path = place / METRICS
        place.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_metrics(folder) if row["step"] < resumed.get(row["stage"], 0)]
        write_text(self._path, "".join(json.dumps(row) + "\n" for row in kept))
        self._offset = kept[-1]["time"] if kept else 0.0
        self._begin = time.monotonic()
        self._writer = SummaryWriter(str(place / TENSORBOARD))
        if self._mirror is not None:
            self._mirror.start()

    def write(self, stage: str, step: int, scalars: dict[str, float], perf: Mapping[str, float] | None = None) -> None:
        """Appends one row with all scalars of a step, and the speed of the steps up to it."""
        elapsed = round(self._offset + time.monotonic() - self._begin, 3)
        with self._path.open("a") as log:
            row = {"stage": stage, "step": step, "time": elapsed, **scalars, PERF: dict(perf or {})}
            log.write(json.dumps(row) + "\n")
        for name, value in scalars.items():
            self._writer.add_scalar(f"{stage}/{name}", value, step)
        for name, value in (perf or {}).items():
            self._writer.add_scalar(f"{stage}/{PERF}/{name}", value, step)

    def copy_soon(self) -> None:
        """Copies the rows to the run folder in the background, if they are written elsewhere."""
        if self._mirror is not None:
            self._mirror.soon()

    def close(self) -> None:
        """Flushes TensorBoard's file, and completes the copies.

        Raises:
            StorageError: The run folder cannot be written to.
        """
        self._writer.close()
        if self._mirror is not None:
            self._mirror.close()
            shutil.rmtree(self._mirror.folder, ignore_errors=True)


def read_metrics(folder: str | Path) -> list[Row]:
    """Reads all rows of a run folder's metric log; skips damaged ones, such as one that a kill has cut off."""
    try:
        content = read_file(joined(folder, METRICS), MAX_JSON_BYTES)
    except FileNotFoundError:
        return []
    rows: list[Row] = []
    for line in content.decode(errors="replace").splitlines():
        try:
            row = parse_json(line)
            if isinstance(row["stage"], str) and isinstance(row["step"], int) and row["time"] >= 0:
                rows.append(row)
        except (ValueError, KeyError, TypeError):
            continue
    return rows
