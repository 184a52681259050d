"""The first hour: what a new user waits for before anything is computed, and what an installation takes.

Each process is checked to have done its work before its CPU time counts.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import raywgen
from raywgen.config import to_yaml
from raywgen.training.config import TrainConfig

_MIB = 1 << 20
_COMMAND = [sys.executable, "-m", "raywgen"]


@dataclass(kw_only=True)
class FirstHourConfig:
    """The settings of the benchmark.

    Attributes:
        repeats: Processes of each kind, of whose times the median counts.
        environment: Folder of the environment whose size is counted; empty for the one that runs this.
    """

    repeats: int = 5
    environment: str = ""

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"repeats={self.repeats}: must be at least 1")


class WrongAnswerError(RuntimeError):
    """A process did not do what was timed; the message holds what it said."""


def measure(config: FirstHourConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Returns CPU seconds, user and system together, of four processes, and sizes in MiB.

    Raises:
        WrongAnswerError: A process did not do its work.
    """
    with TemporaryDirectory(prefix="raywgen-") as temporary:
        run = Path(temporary) / "run"
        run.mkdir()
        (run / "config.yaml").write_text(to_yaml(TrainConfig(method="mcdi", out=str(run))))
        missing = f"{temporary}/corpus"
        imported = "import raywgen; print(raywgen.__version__, 'torch' in __import__('sys').modules)"
        cases: dict[str, tuple[list[str], int, str]] = {
            "help": ([*_COMMAND, "--help"], 0, "Train a generator on a corpus"),
            "status": ([*_COMMAND, "status", str(run)], 0, f"{run}: mcdi, not begun"),
            "import": ([sys.executable, "-c", imported], 0, f"{raywgen.__version__} False"),
            "error": ([*_COMMAND, "train", "mcdi", f"corpus={missing}"], 1, f"{missing} holds no manifest.json"),
        }
        seconds = {name: [cpu_seconds(*case) for _ in range(config.repeats)] for name, case in cases.items()}
    figures = {f"{name}_cpu_s": round(median(each), 3) for name, each in seconds.items()}
    environment = Path(config.environment or sys.prefix)
    figures["package_mib"] = round(_size(Path(raywgen.__file__).parent) / _MIB, 1)
    figures["environment_mib"] = round(_size(environment) / _MIB, 1)
    conditions = {
        "repeats": config.repeats,
        "spread": {name: [round(min(each), 3), round(max(each), 3)] for name, each in seconds.items()},
        "python": sys.version.partition(" ")[0],
        "torch": metadata.version("torch"),
        "ray": metadata.version("ray"),
        "environment": "the one that ran this" if not config.environment else "another one",
    }
    return figures, conditions


def cpu_seconds(command: Sequence[str], status: int, said: str) -> float:
    """Runs a process and returns its CPU seconds, those of its children included.

    Args:
        command: The command.
        status: The exit status that it must have.
        said: A text that it must print, on whatever lines.

    Raises:
        WrongAnswerError: It ended in another way or printed another thing.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    printed = " ".join(f"{done.stdout}\n{done.stderr}".split())
    if done.returncode != status or said not in printed:
        raise WrongAnswerError(f"{' '.join(command)} ended with status {done.returncode} and printed: {printed[:300]}")
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def _size(folder: Path) -> int:
    """Returns the bytes of all files of a folder that are no compiled Python, each once however many names it has."""
    found = {}
    for path in folder.rglob("*"):
        if "__pycache__" not in path.parts and path.is_file() and not path.is_symlink():
            status = path.stat()
            found[status.st_dev, status.st_ino] = status.st_size
    return sum(found.values())
