"""The learning rate of each step."""

from __future__ import annotations

import math

from raywgen.generators import StageConfig


def learning_rate(config: StageConfig, step: int) -> float:
    """Linear warm-up, times a schedule that falls from the peak rate to `floor` of it."""
    optimizer = config.optimizer
    warmup = min(1.0, (step + 1) / max(1, optimizer.warmup_steps))
    match optimizer.schedule:
        case "cosine":
            height = 0.5 * (1 + math.cos(math.pi * step / max(1, config.num_steps)))
        case "linear":
            height = 1 - step / max(1, config.num_steps)
        case "constant":
            height = 1.0
    return optimizer.learning_rate * warmup * (optimizer.floor + (1 - optimizer.floor) * height)
