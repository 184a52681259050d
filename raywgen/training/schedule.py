"""The learning rate of each step."""

from __future__ import annotations

import math

from raywgen.generators import StageConfig


def learning_rate(config: StageConfig, step: int) -> float:
    """Linear warm-up, then half a cosine down to a twentieth of the peak."""
    warmup = min(1.0, (step + 1) / max(1, config.optimizer.warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * step / max(1, config.num_steps)))
    return config.optimizer.learning_rate * warmup * (0.05 + 0.95 * cosine)
