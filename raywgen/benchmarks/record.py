"""Keeps what a benchmark printed, with what is needed to judge it and to take it again: `record=FOLDER`.

`docs/results` holds such files; the pages of results on the site are written from them.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from raywgen.files import write_text

SETTING = "record"
HELP = "Folder, or a path that ends in .json: the result is written there, with commit, date, machine and command."


class RecordError(ValueError):
    """A result cannot be written where the user wants it."""


def split_record(arguments: Sequence[str]) -> tuple[list[str], str]:
    """Separates `record=PATH` from the settings of a benchmark; without it the path is empty."""
    prefix = f"{SETTING}="
    rest = [argument for argument in arguments if not argument.startswith(prefix)]
    paths = [argument.removeprefix(prefix) for argument in arguments if argument.startswith(prefix)]
    return rest, paths[-1] if paths else ""


def record_file(path: str, name: str) -> Path:
    """Returns the file for a benchmark's result and makes its folder, before hours are spent on what goes into it.

    Args:
        path: A file that ends in `.json`, or the folder for one of the benchmark's name.
        name: The benchmark's.

    Raises:
        RecordError: It is a URI, or its folder cannot be made or written.
    """
    if "://" in path:
        raise RecordError(f"{SETTING}={path}: give a local path; results are written beside the pages that show them")
    file = Path(path) if path.endswith(".json") else Path(path) / f"{name}.json"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecordError(f"{SETTING}={path}: {error.strerror}: {error.filename}") from error
    if not os.access(file.parent, os.W_OK):
        raise RecordError(f"{SETTING}={path}: you may not write to {file.parent}")
    return file


def write_record(result: Mapping[str, Any], arguments: Sequence[str], file: Path, code: str) -> None:
    """Writes a result with its commit, date, machine and command.

    Args:
        result: What `raywgen.benchmarks.run.run` returned.
        arguments: Those of the command, without `record=`.
        file: As `record_file` returned it.
        code: What `commit` returned before the benchmark began.
    """
    content = {
        "benchmark": result["benchmark"],
        "command": shlex.join(["python", "jobs/benchmark.py", *arguments]),
        "commit": code,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "transcribed": False,
        "figures": result["figures"],
        "conditions": result["conditions"],
    }
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def commit(records: Path) -> str:
    """Returns the commit of the clone that this package lies in, `+changes` behind it where files differ from it.

    It is empty where the package lies in no clone. A benchmark that runs for hours must ask for it when it begins.

    Args:
        records: A folder whose files are no part of the code.
    """
    root = Path(__file__).parents[2]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return ""
        others = [f":!{records.resolve().relative_to(root)}"] if records.resolve().is_relative_to(root) else []
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", ".", *others) else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def machine() -> dict[str, Any]:
    """Returns the processor, its cores that this process may use, the GPUs, and the versions of Python and torch."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "cpu": _processor(),
        "cores": cores,
        "gpus": [torch.cuda.get_device_name(index) for index in range(num_gpus)],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    """Returns the model of the processor, or its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(models), "") or platform.processor() or platform.machine()
