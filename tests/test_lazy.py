"""Packages that import their names when they are used: the names for type checkers and those that are found agree."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = [
    ".".join(path.parent.relative_to(ROOT).parts)
    for path in sorted((ROOT / "raywgen").rglob("__init__.py"))
    if "lazy_names(" in path.read_text()
]


def declared(package: str) -> dict[str, str]:
    """Each name that type checkers see, and its module."""
    tree = ast.parse((ROOT / package.replace(".", "/") / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


@pytest.mark.parametrize("package", PACKAGES)
def test_type_checkers_see_the_names_that_are_found(package: str) -> None:
    module, names = importlib.import_module(package), declared(package)
    assert names
    assert set(names) <= set(dir(module))
    for name, place in names.items():
        assert getattr(module, name) is getattr(importlib.import_module(place), name)
    assert not names.keys() & {path.stem for path in Path(str(module.__file__)).parent.iterdir()}, (
        "a module of that name would take the place of what the package exports"
    )


def test_a_name_is_imported_when_it_is_used_and_then_kept() -> None:
    code = (
        "import sys, raywgen.training as t; before = 'torch' in sys.modules; t.TrainConfig; "
        "print(before, 'torch' in sys.modules, 'TrainConfig' in vars(t))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "True"]


def test_what_takes_as_long_as_torch_is_not_imported_before_it_is_used() -> None:
    """Every command and every worker would wait for it."""
    code = (
        "import sys, raywgen, raywgen.tuning; [getattr(raywgen, name) for name in dir(raywgen)]; "
        "print(sorted({'scipy.stats', 'scipy.optimize', 'sklearn', 'transformers', 'deepspeed'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]"]
