"""Heads for data sets never seen: meta-trained on some data sets, told a few images of another one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from raywgen.benchmarks import few_shot
from raywgen.benchmarks.leave_one_out import leave_out


@dataclass(kw_only=True)
class Config(few_shot.Config):
    """As of `few-shot`; `data` is always known.

    Attributes:
        held_out: Images of further data sets, each left out in turn while the others are known.
    """

    held_out: list[str] = field(default_factory=list)
    num_episodes: int = 600
    reptile_episodes: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.held_out:
            raise ValueError("held_out is empty: name data to leave out, for instance held_out=[mnist.parquet]")


def measure(config: Config) -> tuple[dict[str, float], dict[str, Any]]:
    """Leaves each held-out data set out in turn."""
    return leave_out(config, ["plain", *(f"{path}::plain" for path in config.held_out)])
