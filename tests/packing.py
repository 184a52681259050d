"""Packs a working directory as Ray does when a job is submitted, by the private function that it calls."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

from ray._private import ray_constants
from ray._private.runtime_env.packaging import create_package


def packed(folder: Path, target: Path, excludes: Sequence[str] = ()) -> set[str]:
    """Writes the package to `target`, and returns the names of its files."""
    every = [*ray_constants.get_runtime_env_default_excludes(), *excludes]
    create_package(str(folder), target, include_gitignore=True, excludes=every)
    with zipfile.ZipFile(target) as package:
        return {name for name in package.namelist() if not name.endswith("/")}
