"""Measures what published networks keep of their accuracy when they are written as tokens, by bits a value.

    bits_LEVELS        bits a value of the tokens of that many levels
    snr_db_LEVELS      signal-to-noise ratio of the networks that the tokens stand for, in units of each tensor's scale
    lost_LEVELS        points of accuracy lost, with statistics of batch normalisation matched on unlabelled images
    most_lost_LEVELS   the same of the network that loses most
    stored_LEVELS      points lost with the statistics as decoded
    limit_db_LEVELS    6.02 dB a bit, the most that a code of independent Gaussian values can reach

A tokeniser is trained for each number of levels, on a corpus of these networks alone, and codes them again: this is
what generation can keep at best, not what a prior reaches. `raywgen plan` shows these figures beside the numbers of
tokens of a layout.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from raywgen.benchmarks.pretrained_networks import Images, Pretrained, PretrainedConfig, find_networks, percent
from raywgen.benchmarks.pretrained_written import pretrained_corpus
from raywgen.benchmarks.recipes import over_seeds
from raywgen.benchmarks.trained import trained_generators
from raywgen.evaluation.tokenizer_report import DB_PER_BIT, tokenizer_report
from raywgen.generators.common.tokenizer import TokenizerConfig
from raywgen.generators.igpg import IGPG, IGPGConfig, IGPGTaskLossConfig, PriorConfig
from raywgen.nn.batch_norm import match_statistics
from raywgen.nn.quantisers import QuantiserConfig


def _tokenizer() -> TokenizerConfig:
    return TokenizerConfig(num_steps=20, batch_size=4, quantiser=QuantiserConfig(num_codes=256))


@dataclass(kw_only=True)
class QualityConfig(PretrainedConfig):
    """The tokenisers.

    Attributes:
        tokenizer: The tokeniser; `quantiser.num_levels` is that of `levels`.
        levels: Numbers of levels of the quantiser.
    """

    num_images: int = 2000
    tokenizer: TokenizerConfig = field(default_factory=_tokenizer)
    levels: list[int] = field(default_factory=lambda: [2, 4, 6, 8, 12, 16])
    out: str = "runs/benchmarks/quality"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.levels or min(self.levels) < 1 or len(set(self.levels)) < len(self.levels):
            raise ValueError(f"levels={self.levels}: give different numbers of levels, each at least 1")


def measure(config: QualityConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Trains a tokeniser for each number of levels, and judges the networks that its tokens stand for."""
    networks = find_networks(config.dir)
    test = config.test_images(config.num_images)
    originals = {network.name: percent(network.module(), test) for network in networks}
    rows, each = [], {}
    for seed in config.all_seeds:
        unlabelled = config.train_images(config.num_unlabelled, seed)
        row: dict[str, float] = {}
        for num_levels in config.levels:
            figures, each[num_levels] = _at(config, num_levels, networks, originals, test, unlabelled, seed)
            row |= {f"{name}_{num_levels}": value for name, value in figures.items()}
        rows.append(row)
    figures, spreads = over_seeds(rows)
    _print(config.levels, figures)
    return figures, config.conditions(spreads) | {
        "original": originals,
        "kept": each,
        "values": {network.name: network.layout.num_values for network in networks},
        "images": {"test": len(test.y_S), "unlabelled": config.num_unlabelled},
        "tokenizer": asdict(config.tokenizer),
    }


def _at(
    config: QualityConfig,
    num_levels: int,
    networks: list[Pretrained],
    originals: dict[str, float],
    test: Images,
    unlabelled: Images,
    seed: int,
) -> tuple[dict[str, float], dict[str, float]]:
    """Returns the figures of a number of levels, and the accuracy of each network, with matched statistics."""
    generator, snr_db = _trained(config, num_levels, networks, seed)
    matched, stored = {}, {}
    for network in networks:
        with torch.no_grad():
            values_1D = generator.reconstruct(network.values_D[None], network.layout)
        state = network.layout.unflatten(values_1D[0])
        moved = match_statistics(network.module(state), network.module(), unlabelled.x_SCHW)
        stored[network.name] = percent(network.module(state), test)
        matched[network.name] = percent(network.module(state | moved), test)
    lost = [originals[name] - accuracy for name, accuracy in matched.items()]
    quantiser = replace(config.tokenizer.quantiser, num_levels=num_levels)
    bits = num_levels * (quantiser.num_codes - 1).bit_length() / config.tokenizer.chunk_length
    figures = {
        "bits": bits,
        "snr_db": snr_db,
        "limit_db": DB_PER_BIT * bits,
        "lost": mean(lost),
        "most_lost": max(lost),
        "stored": mean(originals[name] - accuracy for name, accuracy in stored.items()),
    }
    return figures, matched


def _trained(config: QualityConfig, num_levels: int, networks: list[Pretrained], seed: int) -> tuple[IGPG, float]:
    """Trains a tokeniser on the networks; returns it within a generator, and its signal-to-noise ratio."""
    task = {"name": "images", "path": config.data, "test_path": config.test_data, "limit": 10, "test_limit": 10}
    corpus = pretrained_corpus(config.root(), networks, task | {"channels": len(config.mean)})
    tokenizer = replace(config.tokenizer, quantiser=replace(config.tokenizer.quantiser, num_levels=num_levels))
    generator = IGPGConfig(
        tokenizer=tokenizer,
        prior=PriorConfig(num_steps=0, width=8, num_layers=1, num_heads=1),
        task_loss=IGPGTaskLossConfig(num_steps=0),
    )
    name = f"tokens-{num_levels}"
    chosen = {name: ("igpg", generator)}
    made = trained_generators(config, config.root(), corpus, chosen, shot=0, seed=seed)[name].eval()
    assert isinstance(made, IGPG)
    report = tokenizer_report(made, made.weight_code(), corpus, num_samples=1)
    return made, report.splits[0].snr_db


def _print(levels: list[int], figures: dict[str, float]) -> None:
    names = ("bits", "snr_db", "limit_db", "lost", "most_lost", "stored")
    table = Table("levels", *(name.replace("_", " ") for name in names))
    for num_levels in levels:
        table.add_row(str(num_levels), *(f"{figures[f'{name}_{num_levels}']:.2f}" for name in names))
    Console().print(table)
