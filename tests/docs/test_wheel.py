"""A wheel without a clone: it holds every data file, and its commands find the shipped configs by their names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
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
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("target")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


@pytest.mark.slow
def test_the_wheel_holds_every_data_file(wheel: Path) -> None:
    files = {path.relative_to(ROOT) for path in (ROOT / "raywgen").rglob("*") if path.is_file()}
    data = {str(path) for path in files if path.suffix not in NOT_INSTALLED}
    assert {"raywgen/configs/zoo/digits.yaml", "raywgen/py.typed"} <= data
    with zipfile.ZipFile(wheel) as archive:
        assert data <= set(archive.namelist())


@pytest.mark.slow
def test_commands_work_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}

    def raywgen(command: str) -> str:
        run = [sys.executable, "-P", "-m", "raywgen", *command.split()]
        done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    where = subprocess.run(
        [sys.executable, "-P", "-c", "import raywgen; print(raywgen.__file__)"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(where.stdout.strip()).is_relative_to(installed)

    listed = raywgen("zoo list")
    assert all(path.stem in listed for path in (ROOT / "raywgen" / "configs" / "zoo").glob("*.yaml"))

    zoo = "num_seen_tasks=4 num_validation_tasks=2 num_unseen_tasks=2 seeds_per_task=1 num_steps=8 networks=[[64,14,2]]"
    raywgen(f"zoo train digits {zoo} checkpoint_steps=[2,4,6,8] out=corpus")

    steps = " ".join(f"generator.{name}.num_steps=2" for name in ("tokenizer", "prior", "task_loss"))
    run = "corpus=corpus num_workers=0 num_condition_samples=8 num_query_samples=8"
    raywgen(f"train igpg {run} {steps} out=igpg")
    assert (tmp_path / "igpg" / "generator").is_dir()
    raywgen(f"train igpg/digits {run} {steps} out=igpg")

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
