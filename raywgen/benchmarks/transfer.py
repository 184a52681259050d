"""Heads for unseen data sets: meta-trained on some data sets, given a few images of another one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from raywgen.benchmarks.few_shot_config import FewShotConfig
from raywgen.benchmarks.ink import with_ink_of
from raywgen.benchmarks.leave_one_out import leave_out
from raywgen.tasks.image_tasks import images_of


@dataclass(kw_only=True)
class TransferConfig(FewShotConfig):
    """Settings of `few-shot` and the held-out data sets; `data` is always known.

    Attributes:
        held_out: Images of further data sets, each left out in turn while the others are known.
        match_ink: Invert the images of a held-out data set whose paper is black where that of `data` is white, or the
            reverse, for all methods; some are also measured on the images as they are stored, in figures of the name
            `unmatched_METHOD`. False leaves every image as it is stored.
    """

    held_out: list[str] = field(default_factory=list)
    match_ink: bool = True
    num_episodes: int = 600
    reptile_episodes: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.held_out:
            raise ValueError("held_out is empty: name data to leave out, for instance held_out=[mnist.parquet]")


def measure(config: TransferConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Leaves each held-out data set out in turn."""
    paths = config.held_out
    if config.match_ink:
        reference = images_of(config.data, None, None, None)
        paths = [with_ink_of(reference, path, config.out) for path in paths]
    inverted = {f"{used}::plain": given for given, used in zip(config.held_out, paths, strict=True) if given != used}
    figures, conditions = leave_out(config, ["plain", *(f"{path}::plain" for path in paths)], inverted)
    return figures, conditions | {"match_ink": config.match_ink, "inverted": list(inverted.values())}
