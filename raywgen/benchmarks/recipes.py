"""Shared by benchmarks: trained parts kept under a hash of their recipe and of the code, and tables over seeds."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import torch

import raywgen

# The packages that decide a trained part; those above only launch and judge it.
_PACKAGES = ("weights", "nn", "tasks", "generators", "corpus", "zoo", "training")


@cache
def code_version(packages: Sequence[str] = _PACKAGES) -> str:
    """Returns a hash of the source of these packages, by default of those that decide what is trained."""
    root = Path(raywgen.__file__).parent
    digest = hashlib.sha256()
    for package in packages:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


@dataclass(kw_only=True)
class SeededConfig:
    """Base of the settings of benchmarks that train parts for several seeds.

    Attributes:
        seeds: Number of consecutive seeds; figures are means over them.
        seed: The first seed.
        out: Folder in which trained parts are kept.
        fresh: Whether to ignore the parts that are kept.
    """

    seeds: int = 1
    seed: int = 0
    out: str = "runs/benchmarks"
    fresh: bool = False

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"seeds={self.seeds}: must be at least 1")

    @property
    def all_seeds(self) -> range:
        """All seeds in turn."""
        return range(self.seed, self.seed + self.seeds)

    def root(self) -> str:
        """Returns the folder of kept parts, a new one where none that is kept may be used."""
        return tempfile.mkdtemp(prefix="raywgen-benchmark-") if self.fresh else self.out

    def conditions(self, spreads: Mapping[str, float]) -> dict[str, Any]:
        """Returns the conditions of figures that are means over seeds."""
        conditions = {"seeds": self.seeds, "spread_over_seeds": dict(spreads)}
        return conditions | {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}


def folder_of(root: str | Path, name: str, recipe: Mapping[str, Any]) -> str:
    """Returns the folder of a part with this recipe; the same recipe and code find it again.

    Args:
        root: Folder of all parts.
        name: Readable name of the part.
        recipe: Everything that decides the part.
    """
    key = json.dumps([name, code_version(), dict(recipe)], sort_keys=True, default=str)
    return str(Path(root) / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}")


def over_seeds(rows: Sequence[Mapping[str, float]]) -> tuple[dict[str, float], dict[str, float]]:
    """Returns mean and spread of every figure."""
    means = {name: round(mean(row[name] for row in rows), 4) for name in rows[0]}
    spreads = {name: round(pstdev([row[name] for row in rows]), 4) for name in rows[0]}
    return means, spreads
