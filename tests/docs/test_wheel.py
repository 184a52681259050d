"""A wheel in an environment of its own, outside of any clone: it holds every data file, and the quickstart runs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.docs.as_typed import QUICKSTART, check_quickstart, fresh_environment, run_python, run_raywgen, typed
from tests.docs.pages import ROOT, blocks_of, lines_of

# The pins are for those who install the project, not for its commands.
NOT_INSTALLED = (".py", ".txt", ".pyc")


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
    """The programs of a fresh environment that has the wheel."""
    found = fresh_environment(tmp_path_factory.mktemp("fresh") / ".venv")
    install = ["--python", str(found / "python"), "install", "-q", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *install], check=True)
    return found


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
    said: list[str] = []
    for block in blocks_of(QUICKSTART):
        if block.language == "python":
            said.append(run_python(programs, tmp_path, block))
            continue
        for line in [line for line in lines_of(block) if line.words[0] == "raywgen"]:
            run_raywgen(programs, tmp_path, line)
    check_quickstart(tmp_path, said)


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
