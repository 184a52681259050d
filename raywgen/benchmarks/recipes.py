"""What benchmarks share: trained parts kept under a hash of their recipe and of the code, and tables over seeds."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import raywgen

# What decides a trained part; the rooms above only launch and judge it.
_ROOMS = ("weights", "nn", "tasks", "generators", "corpus", "zoo", "training")


@cache
def code_version() -> str:
    """Hash of the source that decides what is trained."""
    root = Path(raywgen.__file__).parent
    digest = hashlib.sha256()
    for room in _ROOMS:
        for path in sorted((root / room).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def root_of(out: str, fresh: bool) -> str:
    """Where parts are kept; a folder of their own where nothing kept may be used."""
    return tempfile.mkdtemp(prefix="raywgen-benchmark-") if fresh else out


def folder_of(root: str | Path, name: str, recipe: Mapping[str, Any]) -> str:
    """Where a part of this recipe lies; the same recipe and code find it again.

    Args:
        root: Of all parts.
        name: Of the part, for people.
        recipe: All that decides it.
    """
    told = json.dumps([name, code_version(), dict(recipe)], sort_keys=True, default=str)
    return str(Path(root) / f"{name}-{hashlib.sha256(told.encode()).hexdigest()[:12]}")


def over_seeds(rows: Sequence[Mapping[str, float]]) -> tuple[dict[str, float], dict[str, float]]:
    """Mean and spread of every figure."""
    means = {name: round(mean(row[name] for row in rows), 4) for name in rows[0]}
    spreads = {name: round(pstdev([row[name] for row in rows]), 4) for name in rows[0]}
    return means, spreads
