"""Varies Lo-Hp on few-shot heads: sub-trajectory length x SAM radius x share of stored paths, with heat maps.

Accuracy is that on episodes of validation classes, on which settings may be chosen.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from raywgen.benchmarks.few_shot import generated_accuracy
from raywgen.benchmarks.few_shot_config import FewShotConfig
from raywgen.benchmarks.few_shot_parts import TaskSource, heads_generators, heads_zoo, trained_encoder, validation_side
from raywgen.benchmarks.recipes import over_seeds
from raywgen.benchmarks.trained import Headline, trained_zoo
from raywgen.generators.lohp import LoHpConfig, LoHpSampling, PathConfig
from raywgen.tasks import SAMConfig
from raywgen.tasks.encoders import load_encoder
from raywgen.training.session import ray_session

_PERCENT = 100.0
_HEAT_MAP = "lohp-ablation.svg"
Key = tuple[int, float, float]
"""Length, SAM radius, mix."""


@dataclass(kw_only=True)
class LoHpAblationConfig(FewShotConfig):
    """Settings of `few-shot`, of which those of test episodes and of other methods have no effect, and the variations.

    Attributes:
        lengths: Lengths of sub-trajectories, each a divisor of the steps of the path.
        radii: Radii of SAM in the zoo; 0 trains without it.
        mixes: Shares of stored paths.
    """

    generator: Headline = "lohp"
    lengths: list[int] = field(default_factory=lambda: [2, 4, 12])
    radii: list[float] = field(default_factory=lambda: [0.0, 0.05, 0.2])
    mixes: list[float] = field(default_factory=lambda: [0.0, 0.5, 1.0])

    def __post_init__(self) -> None:
        super().__post_init__()
        for length, mix in itertools.product(self.lengths, self.mixes):
            self.changed(length, mix)

    def changed(self, length: int, mix: float) -> LoHpConfig:
        """Returns Lo-Hp with this length and mix, and one evaluation for each sub-trajectory."""
        steps = self.lohp.path.num_steps
        path = PathConfig(num_steps=steps, length=length, noise=self.lohp.path.noise)
        sampling = LoHpSampling(num_steps=steps // length)
        return replace(self.lohp, path=path, sampling=sampling, policy=replace(self.lohp.policy, mix=mix))


def measure(config: LoHpAblationConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Trains a zoo for every radius and a policy for every source, for every seed; writes the heat maps."""
    root = config.root()
    rows = [_one_seed(config, root, seed) for seed in config.all_seeds]
    means, spreads = over_seeds([{_name(key): value for key, value in row.items()} for row in rows])
    path = Path(root) / _HEAT_MAP
    draw_heat_maps({key: means[_name(key)] for key in rows[0]}, path)
    conditions = {"heat_map": str(path), "episodes": config.num_validation}
    return means, config.conditions(spreads) | conditions


def _one_seed(config: LoHpAblationConfig, root: str, seed: int) -> dict[Key, float]:
    encoder, _ = trained_encoder(config, root, seed)
    side = validation_side(config, load_encoder(encoder), seed).features
    found: dict[Key, float] = {}
    steps = _checkpoint_steps(config)
    with ray_session():
        for radius in config.radii:
            plain = heads_zoo(config, seed, encoder, TaskSource())
            optimizers = [replace(one, sam=SAMConfig(rho=radius)) for one in plain.optimizers]
            zoo = replace(plain, optimizers=optimizers, num_steps=steps[-1], checkpoint_steps=steps)
            corpus = trained_zoo(root, zoo)
            (facts,) = corpus.networks.values()
            keys = [(length, radius, mix) for length, mix in itertools.product(config.lengths, config.mixes)]
            chosen = {_name(key): ("lohp", config.changed(key[0], key[2])) for key in keys}
            generators = heads_generators(config, root, seed, corpus, chosen)
            for key in keys:
                scores = generated_accuracy(generators[_name(key)], facts.layout, side, seed)
                found[key] = _PERCENT * float(scores.mean())
    return found


def _checkpoint_steps(config: LoHpAblationConfig) -> list[int]:
    """Returns five optimiser steps for each step of the path, so that every length finds its local targets."""
    return [5 * step for step in range(config.lohp.path.num_steps + 1)]


def _name(key: Key) -> str:
    length, radius, mix = key
    return f"length_{length}_rho_{radius:g}_mix_{mix:g}"


def draw_heat_maps(values: Mapping[Key, float], path: Path) -> None:
    """Draws one map of lengths by mixes for each radius, all on one scale."""
    lengths, radii, mixes = (sorted({key[place] for key in values}) for place in range(3))
    figure = Figure(figsize=(3.2 * len(radii) + 0.8, 3.0), layout="constrained")
    FigureCanvasSVG(figure)
    low, high = min(values.values()), max(values.values())
    digits = 1 if high - low > 1 else 2
    panels: Sequence[Any] = figure.subplots(1, len(radii), squeeze=False)[0]
    images = []
    for panel, radius in zip(panels, radii, strict=True):
        grid = [[values[int(length), radius, mix] for mix in mixes] for length in lengths]
        images.append(panel.imshow(grid, vmin=low, vmax=high, cmap="cividis", aspect="auto"))
        for row, of_length in enumerate(grid):
            for column, value in enumerate(of_length):
                shade = "black" if value > (low + high) / 2 else "white"
                panel.text(column, row, f"{value:.{digits}f}", ha="center", va="center", color=shade)
        panel.set_title(f"SAM radius {radius:g}")
        panel.set_xticks(range(len(mixes)), [f"{mix:g}" for mix in mixes])
        panel.set_yticks(range(len(lengths)), [str(length) for length in lengths])
        panel.set_xlabel("share of stored paths")
    panels[0].set_ylabel("sub-trajectory length")
    figure.colorbar(images[0], ax=list(panels), label="accuracy")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
