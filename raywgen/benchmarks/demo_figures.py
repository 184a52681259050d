"""The demo's figures: ladder and baselines in percent, means over tasks and architectures."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import torch

from raywgen.benchmarks.demo import DemoConfig, run_demo
from raywgen.progress import Reporter

FIGURES = (
    "seen_original",
    "seen_reconstructed",
    "seen_generated",
    "unseen_original",
    "unseen_generated",
    "unseen_nearest",
    "unseen_average",
    "unseen_gaussian",
    "unseen_gradient",
    "unseen_hypernetwork",
    "unseen_shuffled",
    "unseen_token_prior",
    "random",
    "novelty_distance",
    "minutes",
)


@dataclass(kw_only=True)
class DemoFiguresConfig:
    """The demo over some seeds.

    Attributes:
        demo: The demo's own settings; `demo.seed` is the first seed.
        seeds: Number of consecutive seeds; figures are means over them.
        out: Folder in which run folders are kept, one per seed; by default they are temporary.
    """

    demo: DemoConfig = field(default_factory=DemoConfig)
    seeds: int = 1
    out: str = ""

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"seeds={self.seeds}: must be at least 1")


def measure(config: DemoFiguresConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Runs the demo from nothing for every seed."""
    first = config.demo.seed
    results = []
    folder = Path(config.out or tempfile.mkdtemp(prefix="raywgen-demo-"))
    for seed in range(first, first + config.seeds):
        config.demo.seed = seed
        config.demo.out = str(folder / f"seed{seed}")
        results.append(run_demo(config.demo, Reporter()))
    if not config.out:
        shutil.rmtree(folder)
    rows = [{**result.figures, "minutes": result.minutes} for result in results]
    figures = {name: round(mean(row[name] for row in rows), 3) for name in FIGURES}
    conditions = {
        "seeds": config.seeds,
        "spread_over_seeds": {name: round(pstdev([row[name] for row in rows]), 3) for name in FIGURES},
        "num_test_images": results[0].num_test_images,
        "best_of": results[0].best_of,
        "num_samples": results[0].num_samples,
        "claims_held": all(claim.holds for result in results for claim in result.claims),
        "verdicts": [result.novelty.verdict for result in results if result.novelty],
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    return figures, conditions
