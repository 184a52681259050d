"""One checkpoint of a corpus, read into memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from raywgen.weights import StateDict


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The weights of one network at one step, with the facts about it.

    Attributes:
        facts: What is known of it by name, such as `checkpoint_id`, `architecture`, `step` and `test_accuracy`.
        weights: Its `state_dict`, bit for bit as it was ingested.

    Examples:
        >>> checkpoint = raywgen.Corpus.open("runs/zoo/corpus")[-1]
        >>> checkpoint.facts["architecture"], checkpoint.facts["step"]
        ('mlp-64-5-4-2', 120)
    """

    facts: dict[str, Any]
    weights: StateDict

    def __repr__(self) -> str:
        num_values = sum(tensor.numel() for tensor in self.weights.values())
        return f"Checkpoint({self.facts['checkpoint_id']!r}, {num_values:,} values in {len(self.weights)} tensors)"
