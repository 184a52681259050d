"""The metrics of a run: a JSONL log, and scalars for TensorBoard."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raywgen.files import write_text
from raywgen.inputs import MAX_JSON_BYTES, parse_json, read_regular

Row = dict[str, Any]
"""One row of the log: `stage`, `step`, `time` in seconds since the run began, the metrics of the step, and below `perf`
the figures of `StepMeter`, which differ from run to run. Logs of older versions have no `perf`."""
PERF = "perf"
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"


class RunLog:
    """Appends metrics to the log of a run folder; only one worker may hold it.

    Args:
        folder: The run folder.
        resumed: Stage name -> first step that will be written again. Its rows from there on are dropped, and so are
            all rows of stages that are not named.
    """

    def __init__(self, folder: str | Path, resumed: Mapping[str, float]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._path = Path(folder) / METRICS
        self._path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_metrics(folder) if row["step"] < resumed.get(row["stage"], 0)]
        write_text(self._path, "".join(json.dumps(row) + "\n" for row in kept))
        self._offset = kept[-1]["time"] if kept else 0.0
        self._begin = time.monotonic()
        self._writer = SummaryWriter(str(Path(folder) / TENSORBOARD))

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

    def close(self) -> None:
        """Flushes TensorBoard's file."""
        self._writer.close()


def read_metrics(folder: str | Path) -> list[Row]:
    """Reads all rows of a run folder's metric log; skips damaged ones, such as one that a kill has cut off."""
    path = Path(folder) / METRICS
    if not path.is_file():
        return []
    rows: list[Row] = []
    for line in read_regular(path, MAX_JSON_BYTES).decode(errors="replace").splitlines():
        try:
            row = parse_json(line)
            if isinstance(row["stage"], str) and isinstance(row["step"], int) and row["time"] >= 0:
                rows.append(row)
        except (ValueError, KeyError, TypeError):
            continue
    return rows
