"""A module with new weights, and what is known of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import nn

from raywgen.tasks.standing import Standing

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True, slots=True, kw_only=True)
class Filled(Generic[ModuleT]):
    """A module with new weights, and what is known of them.

    Attributes:
        module: The module that was filled.
        on_samples: Accuracy on the labelled samples, beside chance; None where none were given.
        best_of: Number of candidates that it was chosen from by its loss on these samples; 1 where none was chosen.
        log_prob: Log-probability under the generator, nats, or None where the method has no density. It says how likely
            the generator finds such a network, not how accurate it is.
        is_known: Whether the generator was trained on this layout.
    """

    module: ModuleT
    on_samples: Standing | None
    best_of: int
    log_prob: float | None
    is_known: bool

    def __repr__(self) -> str:
        judged = "" if self.on_samples is None else f", {self.on_samples.sentence()}"
        known = "" if self.is_known else ", a layout that the generator was never trained on"
        return f"Filled({type(self.module).__name__}, the best of {self.best_of}{judged}{known})"
