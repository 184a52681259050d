"""Baselines that adapt by gradient steps: a network from scratch, and Reptile's head on the encoder's features.

Both learn as the benchmark's Reptile does. The first shows what the support images alone are worth, the second what
Reptile makes of the features that generators see. Numbers of steps, and the rate from scratch, are chosen on validation
episodes.

Shape letters beyond the legend in `raywgen.weights`: B episodes.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from raywgen.benchmarks.few_shot_config import FewShotConfig
from raywgen.benchmarks.few_shot_parts import Parts, Side, TaskSource, known_images
from raywgen.evaluation.few_shot import (
    Learner,
    ReptileConfig,
    ReptileState,
    accuracy_by_steps,
    fewest_steps,
    one_thread,
    train_reptile,
)
from raywgen.evaluation.few_shot.reptile import Prepare
from raywgen.tasks.episodes import EpisodeSampler
from raywgen.tasks.networks.conv4 import Conv4

_SCRATCH_RATES, _SCRATCH_STEPS = (0.001, 0.003), (5, 10, 20, 50)
_HEAD_STEPS = (1, 2, 3, 5, 8, 12, 20, 50)
_SCRATCH_VALIDATION, _HEAD_VALIDATION = 20, 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Adaptation:
    """A start with the settings by which it adapts to an episode.

    Attributes:
        network: A network of its architecture.
        config: Settings of learning.
        start: The start.
        prepare: Turns the pixels of a side into what the network takes.
        num_steps: Gradient steps.
    """

    network: nn.Module
    config: ReptileConfig
    start: ReptileState
    prepare: Callable[[Side], Prepare]
    num_steps: int

    def accuracy(self, side: Side, num_episodes: int) -> Tensor:
        """Returns the accuracy `(B,)` on the first episodes of a side."""
        return _by_steps(self, side, num_episodes, (self.num_steps,))[:, 0]

    def call(self, side: Side) -> Callable[[], object]:
        """Returns a function that adapts to the first episode of a side, from its pixels."""
        learner, episode, prepare = Learner(self.network, self.config), side.pixels.episode(0), self.prepare(side)
        return lambda: learner.adapt(self.start, prepare(episode.support_x), episode.support_y, self.num_steps)

    def settings(self) -> dict[str, Any]:
        """Returns what was chosen on validation episodes."""
        return {"rate": self.config.learning_rate, "steps": self.num_steps}


def from_scratch(config: FewShotConfig, parts: Parts) -> Adaptation:
    """Returns an untrained network of the whole network's architecture."""
    encoder = parts.encoder.module
    assert isinstance(encoder, Conv4), "the benchmark trains its encoder itself"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(parts.seed)
        network = Conv4(num_classes=config.way, in_channels=encoder.in_channels, image_size=encoder.image_size)
    candidates = [
        Adaptation(
            network=network,
            config=replace(config.reptile, learning_rate=rate, head_learning_rate=None),
            start=ReptileState.of(network),
            prepare=lambda side: side.prepare,
            num_steps=0,
        )
        for rate in _SCRATCH_RATES
    ]
    num_validation = min(config.num_validation, _SCRATCH_VALIDATION)
    judged = [_by_steps(one, parts.validation, num_validation, _SCRATCH_STEPS) for one in candidates]
    best = max(range(len(candidates)), key=lambda place: float(judged[place].mean(dim=0).max()))
    return replace(candidates[best], num_steps=fewest_steps(judged[best], _SCRATCH_STEPS))


def reptile_head(config: FewShotConfig, parts: Parts, source: TaskSource) -> Adaptation:
    """Meta-trains the start of a linear head on the encoder's features, on the tasks of the whole network's start."""
    rate = config.reptile.head_learning_rate or config.reptile.learning_rate
    learning = replace(config.reptile, learning_rate=rate, augment="", bf16=False)
    head = nn.Linear(parts.test.features.support_x.shape[2], config.way)
    network = nn.Sequential(OrderedDict(flat=nn.Flatten(), head=head))
    for parameter in network.parameters():
        nn.init.zeros_(parameter)

    def prepare(side: Side) -> Prepare:
        return lambda x_SCHW: parts.encoder(side.prepare(x_SCHW).flatten(1))[:, :, None, None]

    data, classes = known_images(config, parts.seed, source)
    shot = learning.train_shots
    sampler = EpisodeSampler(data, classes, way=config.way, shot=shot, num_query=1, seed=parts.seed, rotations=True)
    with one_thread():
        start = train_reptile(
            network, sampler, learning, prepare=prepare(parts.validation), num_workers=os.cpu_count() or 1
        )
    row = Adaptation(network=network, config=learning, start=start, prepare=prepare, num_steps=0)
    judged = _by_steps(row, parts.validation, min(config.num_validation, _HEAD_VALIDATION), _HEAD_STEPS)
    return replace(row, num_steps=fewest_steps(judged, _HEAD_STEPS))


def _by_steps(row: Adaptation, side: Side, num_episodes: int, num_steps: tuple[int, ...]) -> Tensor:
    learners = [Learner(row.network, row.config) for _ in range(os.cpu_count() or 1)]
    with one_thread():
        return accuracy_by_steps(
            learners,
            row.start,
            side.pixels,
            prepare=row.prepare(side),
            num_episodes=num_episodes,
            num_steps=num_steps,
        )
