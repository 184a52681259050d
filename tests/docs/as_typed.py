"""Runs what README and quickstart say as a user types it, in a fresh environment, with small settings added."""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
import venv
from pathlib import Path

from raywgen.config import parse_overrides
from tests.docs.pages import Block, Line

QUICKSTART = "docs/quickstart.md"
_ZOO = ["num_seen_tasks=8", "num_validation_tasks=2", "num_unseen_tasks=2", "num_steps=60", "checkpoint_steps=[50,60]"]
_IGPG = ["tokenizer.quantiser.num_codes=16", *(f"{stage}.num_steps=2" for stage in ("tokenizer", "prior", "task_loss"))]
SMALL = {
    "demo": [
        *("num_workers=0", "best_of=2", "hypernetwork.task_loss.num_steps=2"),
        *(f"zoo.{each}" for each in _ZOO),
        *(f"igpg.{each}" for each in _IGPG),
    ],
    "zoo train": _ZOO,
    "train": ["num_workers=0", *(f"generator.{each}" for each in _IGPG)],
    "generate": ["best_of=2"],
    "evaluate": ["best_of=2"],
}
"""Settings that are added to the commands of the page, which take minutes without."""
MADE_SMALL = """
import functools, json, os, raywgen
for name, settings in json.loads(os.environ["SMALL"]).items():
    function = {"zoo train": "train_zoo"}.get(name, name)
    if hasattr(raywgen, function):
        setattr(raywgen, function, functools.partial(getattr(raywgen, function), **settings))
"""
"""What stands before the Python of the page, whose functions then take the same settings."""


def fresh_environment(folder: Path) -> Path:
    """Makes a virtual environment that finds what raywgen needs in the one of the tests; returns its programs."""
    venv.create(folder, symlinks=True)
    share_packages(folder)
    return folder / "bin"


def share_packages(environment: Path) -> None:
    """Lets an environment find the packages of the one of the tests, in place of downloading them again."""
    packages = sysconfig.get_path("purelib", vars={"base": str(environment)})
    (Path(packages) / "needed.pth").write_text(f"{sysconfig.get_path('purelib')}\n")


def typed(programs: Path, folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs what a user types in a folder."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "COLUMNS": "120", **variables}
    command = [str(programs / words[0]), *words[1:]]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done


def run_python(programs: Path, folder: Path, block: Block) -> str:
    """Runs the Python of a page; returns what it prints and says, one after the other."""
    small = json.dumps({name: parse_overrides(given) for name, given in SMALL.items()})
    done = typed(programs, folder, "python", "-c", f"{MADE_SMALL}\n{block.text}", SMALL=small)
    return done.stdout + done.stderr


def run_raywgen(programs: Path, folder: Path, line: Line) -> None:
    """Runs a `raywgen` command of a page."""
    name = " ".join(line.words[1:3]) if line.words[1] in ("zoo", "corpus") else line.words[1]
    typed(programs, folder, *line.words, *SMALL.get(name, []))


def check_quickstart(folder: Path, said: list[str]) -> None:
    """Asserts what the quickstart promises, after all of it was run in a folder."""
    filled, by_hand = said
    assert "Sequential on your samples, the best of 8 by its loss on them: " in filled
    assert 0 <= float(by_hand.splitlines()[0]) <= 100
    made = {"demo/report.html", "demo/more/networks.json", "zoo/corpus/manifest.json", "igpg/report.html"}
    assert [name for name in made if not (folder / "runs" / name).is_file()] == []
