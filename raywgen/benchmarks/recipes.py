"""What benchmarks share: trained parts kept under a hash of their recipe and of the code, and tables over seeds."""

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

# What decides a trained part; the rooms above only launch and judge it.
_ROOMS = ("weights", "nn", "tasks", "generators", "corpus", "zoo", "training")


@cache
def code_version(rooms: Sequence[str] = _ROOMS) -> str:
    """Hash of the source of these rooms; by default of those that decide what is trained."""
    root = Path(raywgen.__file__).parent
    digest = hashlib.sha256()
    for room in rooms:
        for path in sorted((root / room).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


@dataclass(kw_only=True)
class SeededConfig:
    """What benchmarks share that train parts for several seeds.

    Attributes:
        seeds: How many seeds in a row; figures are means over them.
        seed: The first one.
        out: Where trained parts are kept.
        fresh: Use nothing that is kept.
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
        """Each in turn."""
        return range(self.seed, self.seed + self.seeds)

    def root(self) -> str:
        """Where parts are kept; a folder of their own where nothing kept may be used."""
        return tempfile.mkdtemp(prefix="raywgen-benchmark-") if self.fresh else self.out

    def conditions(self, spreads: Mapping[str, float]) -> dict[str, Any]:
        """Of figures that are means over seeds."""
        told = {"seeds": self.seeds, "spread_over_seeds": dict(spreads)}
        return told | {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}


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
