from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_WITHOUT_RAY = """
import importlib, pkgutil, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("ray", "deepspeed"):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Refuse())
import raywgen
package = importlib.import_module(sys.argv[1])
names = [info.name for info in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
for name in names:
    importlib.import_module(name)
print(len(names))
"""


def test_a_room_imports_only_from_floors_below_it() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"[4-9] kept, 0 broken", done.stdout)


@pytest.mark.parametrize("room", ["weights", "nn", "tasks", "generators"])
def test_the_science_imports_where_neither_ray_nor_deepspeed_is_installed(room: str) -> None:
    command = [sys.executable, "-c", _WITHOUT_RAY, f"raywgen.{room}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 1


def test_deepspeed_is_imported_only_inside_functions() -> None:
    offenders = [
        str(path)
        for path in (ROOT / "raywgen").rglob("*.py")
        if any(line.startswith(("import deepspeed", "from deepspeed")) for line in path.read_text().splitlines())
    ]
    assert offenders == []
