"""Compares statistics of batch normalisation that are estimated batch by batch with those of one large batch.

    NETWORK_published             accuracy of a published network with the statistics of its training, percent
    NETWORK_once_NUM              with statistics of that many unlabelled images in one batch
    NETWORK_by_SIZE_NUM           with those of the same images in batches of that size
    NETWORK_by_SIZE_NUM_off       relative difference of the logits of the latter two, percent
    largest_loss                  most points of accuracy lost by batches, over networks, numbers and sizes

Weights are as they were published. Both ways are `raywgen.reestimate_statistics`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from raywgen.benchmarks.pretrained_networks import Images, Pretrained, PretrainedConfig, find_networks, percent
from raywgen.benchmarks.recipes import over_seeds
from raywgen.nn.batch_norm import reestimate_statistics

_IMAGES_OF_LOGITS = 1000


@dataclass(kw_only=True)
class BatchStatisticsConfig(PretrainedConfig):
    """The numbers of images.

    Attributes:
        nums: Numbers of unlabelled images.
        batch_sizes: Sizes of the batches in which they are run.
    """

    num_images: int = 4000
    nums: list[int] = field(default_factory=lambda: [512, 2048])
    batch_sizes: list[int] = field(default_factory=lambda: [16, 64])
    out: str = "runs/benchmarks/batch-statistics"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.nums or not self.batch_sizes or min(*self.nums, *self.batch_sizes) < 2:
            raise ValueError(f"nums={self.nums}, batch_sizes={self.batch_sizes}: give some, each at least 2")


def measure(config: BatchStatisticsConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Estimates the statistics of every network in both ways, and judges the networks."""
    networks, test = find_networks(config.dir), config.test_images(config.num_images)
    rows = []
    for seed in config.all_seeds:
        x_SCHW = config.train_images(max(config.nums), seed).x_SCHW
        order_S = torch.randperm(len(x_SCHW), generator=torch.Generator().manual_seed(seed))
        row: dict[str, float] = {}
        for network in networks:
            row |= _of_network(config, network, x_SCHW[order_S], test)
            print(f"{network.name}: done", flush=True)
        rows.append(row)
    figures, spreads = over_seeds(rows)
    figures["largest_loss"] = max(
        figures[f"{network.name}_once_{num}"] - figures[f"{network.name}_by_{size}_{num}"]
        for network in networks
        for num in config.nums
        for size in config.batch_sizes
    )
    _print(config, networks, figures)
    return figures, config.conditions(spreads) | {
        "nums": config.nums,
        "batch_sizes": config.batch_sizes,
        "images": {"test": len(test.y_S), "logits": min(_IMAGES_OF_LOGITS, len(test.y_S))},
    }


@torch.no_grad()
def _of_network(config: BatchStatisticsConfig, network: Pretrained, x_SCHW: Tensor, test: Images) -> dict[str, float]:
    figures = {f"{network.name}_published": percent(network.module(), test)}
    for num in config.nums:
        whole = network.module(network.state | reestimate_statistics(network.module(), x_SCHW[:num]))
        figures[f"{network.name}_once_{num}"] = percent(whole, test)
        logits = whole(test.x_SCHW[:_IMAGES_OF_LOGITS])
        for size in config.batch_sizes:
            name, batches = f"{network.name}_by_{size}_{num}", x_SCHW[:num].split(size)
            streamed = network.module(network.state | reestimate_statistics(network.module(), batches))
            difference = streamed(test.x_SCHW[:_IMAGES_OF_LOGITS]) - logits
            figures[name] = percent(streamed, test)
            figures[f"{name}_off"] = 100 * float(difference.norm() / logits.norm())
    return figures


def _print(config: BatchStatisticsConfig, networks: list[Pretrained], figures: dict[str, float]) -> None:
    table = Table("network", "published", *(f"{num} {way}" for num in config.nums for way in _ways(config)))
    for network in networks:
        cells = [f"{figures[f'{network.name}_published']:.1f}"]
        for num in config.nums:
            cells.append(f"{figures[f'{network.name}_once_{num}']:.1f}")
            for size in config.batch_sizes:
                name = f"{network.name}_by_{size}_{num}"
                cells.append(f"{figures[name]:.1f} ({figures[f'{name}_off']:.1f} %)")
        table.add_row(network.name, *cells)
    Console().print(table)


def _ways(config: BatchStatisticsConfig) -> list[str]:
    return ["at once", *(f"by {size}" for size in config.batch_sizes)]
