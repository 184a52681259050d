"""A wheel in an environment of its own, outside of any clone: it holds every data file, and the quickstart runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raywgen.config import parse_overrides
from tests.docs.pages import ROOT, blocks_of, lines_of

QUICKSTART = "docs/quickstart.md"
# The pins are for those who install the project, not for its commands.
NOT_INSTALLED = (".py", ".txt", ".pyc")
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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    clone = tmp_path_factory.mktemp("clone")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    shutil.copytree(ROOT / "raywgen", clone / "raywgen", ignore=shutil.ignore_patterns("__pycache__"))
    build = ["wheel", "-q", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", *build, "-w", str(clone), str(clone)], check=True)
    (path,) = clone.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a fresh environment, to which what raywgen needs comes from the one of the tests."""
    folder = tmp_path_factory.mktemp("fresh") / ".venv"
    venv.create(folder, symlinks=True)
    packages = sysconfig.get_path("purelib", vars={"base": str(folder)})
    (Path(packages) / "needed.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    install = ["--python", str(folder / "bin/python"), "install", "-q", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *install], check=True)
    return folder / "bin"


def typed(programs: Path, folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs what a user types in a folder."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "COLUMNS": "120", **variables}
    command = [str(programs / words[0]), *words[1:]]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done


@pytest.mark.slow
def test_the_wheel_holds_every_data_file(wheel: Path) -> None:
    files = {path.relative_to(ROOT) for path in (ROOT / "raywgen").rglob("*") if path.is_file()}
    data = {str(path) for path in files if path.suffix not in NOT_INSTALLED}
    assert {"raywgen/configs/zoo/digits.yaml", "raywgen/py.typed"} <= data
    with zipfile.ZipFile(wheel) as archive:
        assert data <= set(archive.namelist())


@pytest.mark.slow
def test_the_quickstart_runs_as_typed(programs: Path, tmp_path: Path) -> None:
    where = typed(programs, tmp_path, "python", "-c", "import raywgen; print(raywgen.__file__)").stdout.strip()
    assert Path(where).is_relative_to(programs.parent)
    said: list[subprocess.CompletedProcess[str]] = []
    small = json.dumps({name: parse_overrides(given) for name, given in SMALL.items()})
    for block in blocks_of(QUICKSTART):
        if block.language == "python":
            said.append(typed(programs, tmp_path, "python", "-c", f"{MADE_SMALL}\n{block.text}", SMALL=small))
            continue
        for line in lines_of(block):
            if line.words[0] == "raywgen":
                name = " ".join(line.words[1:3]) if line.words[1] in ("zoo", "corpus") else line.words[1]
                typed(programs, tmp_path, *line.words, *SMALL.get(name, []))
    filled, by_hand = said
    assert "Sequential on your samples, the best of 8 by its loss on them: " in filled.stderr
    assert 0 <= float(by_hand.stdout) <= 100
    made = {"demo/report.html", "demo/more/networks.json", "zoo/corpus/manifest.json", "igpg/report.html"}
    assert [name for name in made if not (tmp_path / "runs" / name).is_file()] == []


@pytest.mark.slow
def test_commands_find_the_shipped_configs(programs: Path, tmp_path: Path) -> None:
    def raywgen(command: str) -> str:
        return typed(programs, tmp_path, "raywgen", *command.split()).stdout

    listed = raywgen("zoo list")
    assert all(path.stem in listed for path in (ROOT / "raywgen" / "configs" / "zoo").glob("*.yaml"))

    fixed = "fixed.zoo.num_seen_tasks=4 fixed.zoo.num_validation_tasks=2 fixed.zoo.num_unseen_tasks=2"
    fixed += " fixed.train.generator.policy.num_steps=4 fixed.train.generator.policy.batch_size=4"
    raywgen(f"tune lohp {fixed} num_trials=1 max_concurrent=1 out=tuned")
    assert (tmp_path / "tuned" / "best.yaml").is_file()

    write_characters(tmp_path / "images")
    episodes = "num_episodes=4 validate_every=2 validation_episodes=2 way=5 width=8"
    assert "encoder holds the encoder" in raywgen(f"encoder train omniglot path=images group= {episodes} out=encoder")

    raywgen("cluster render igpg/digits corpus=/mnt/raywgen/corpus out=/mnt/raywgen/igpg --into rendered")
    assert "deepspeed" in (tmp_path / "rendered" / "runtime_env.yaml").read_text()


def write_characters(folder: Path) -> None:
    """Writes a folder of class folders, with random images."""
    rng = np.random.default_rng(0)
    for character in range(40):
        (folder / f"{character:02}").mkdir(parents=True)
        for index in range(20):
            image = rng.integers(0, 255, (28, 28), dtype=np.uint8)
            Image.fromarray(image).save(folder / f"{character:02}" / f"{index}.png")
