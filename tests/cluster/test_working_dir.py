"""What jobs send, packed by Ray's own functions from a copy of the clone with everything that gathers in one."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from raywgen.cluster.working_dir import check_working_dir, uploaded_files
from raywgen.ray_address import ClusterError
from tests.packing import packed

ROOT = Path(__file__).parents[2]
MIB = 2**20
GATHERED = {
    "runs/igpg/ray_train/checkpoint/state.safetensors": 30 * MIB,
    ".venv/lib/python3.11/site-packages/torch/libtorch.so": 30 * MIB,
    ".venv-gpu/lib/libcuda.so": 12 * MIB,
    ".git/objects/pack/pack-1.pack": 12 * MIB,
    "data/mnist-train.parquet": 12 * MIB,
    "cifar10-train.parquet": 12 * MIB,
    "networks/one.safetensors": 12 * MIB,
    "nets/resnet20.pt": 12 * MIB,
    "shared/reference.bin": 12 * MIB,
    "raywgen/__pycache__/launch.pyc": 12 * MIB,
    "build/lib/raywgen.so": 12 * MIB,
}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clone")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file() or (ROOT / name).is_symlink():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name, follow_symlinks=False)
    for name, size in GATHERED.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("wb") as file:
            file.truncate(size)
    return folder


def test_a_clone_in_use_stays_small(clone: Path, tmp_path: Path) -> None:
    names = packed(clone, tmp_path / "package.zip")
    assert (tmp_path / "package.zip").stat().st_size < 10 * MIB
    assert not names & GATHERED.keys()
    scripts = {f"jobs/{path.name}" for path in (ROOT / "jobs").glob("*.py")}
    assert scripts | {"raywgen/training/launcher.py", "configs/igpg/digits.yaml", "pyproject.toml"} <= names
    assert not any(name.startswith("tests/") for name in names)


def test_the_look_ahead_sees_what_ray_packs(clone: Path, tmp_path: Path) -> None:
    files = uploaded_files(clone)
    assert files.keys() == packed(clone, tmp_path / "package.zip")
    assert check_working_dir(clone) == sum(files.values())


def test_what_is_too_large_is_named(tmp_path: Path) -> None:
    for name, size in (("notes.bin", 3 * MIB), ("mine/a.bin", 40 * MIB), ("mine/b.bin", 70 * MIB), ("other/c", MIB)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
    with pytest.raises(ClusterError) as refused:
        check_working_dir(tmp_path)
    assert "is 114 MiB" in str(refused.value)
    assert "largest are mine/b.bin (70.0 MiB), mine/a.bin (40.0 MiB), notes.bin (3.0 MiB)" in str(refused.value)
    assert f"add them to {tmp_path}{os.sep}.rayignore" in str(refused.value)
    (tmp_path / ".rayignore").write_text("/mine/\n")
    assert check_working_dir(tmp_path) == 4 * MIB + len("/mine/\n")


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="is no folder"):
        check_working_dir(tmp_path / "nothing")
