"""Heads for images of an unseen domain: meta-trained in some domains, given a few images in another one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from raywgen.benchmarks.few_shot_config import FewShotConfig
from raywgen.benchmarks.leave_one_out import leave_out


@dataclass(kw_only=True)
class DomainsConfig(FewShotConfig):
    """Settings of `few-shot` and the domains; test classes are unseen too.

    Attributes:
        domains: The first is always known, because the encoder is trained in it; each other is left out in turn.
    """

    domains: list[str] = field(default_factory=lambda: ["plain", "invert", "rotate-45", "contrast-0.25", "scale-0.6"])
    num_episodes: int = 600
    reptile_episodes: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.domains) < 2 or self.domains[0] != "plain":
            raise ValueError(f"domains={self.domains}: give `plain` first, then at least one to leave out")


def measure(config: DomainsConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Leaves each domain but the first out in turn."""
    return leave_out(config, config.domains)
