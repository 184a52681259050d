"""Batches of weights and the conditions that a generator is given for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from raywgen.weights.layout import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """The condition that a generator is given for B networks, beside the layout to fill.

    Attributes:
        instructions: B texts.
        samples_BSF: Inputs of labelled samples of the task's data, float32, flattened to F features.
        labels_BS: Labels of these samples, int64.
        policies: Names of the B optimisers to imitate; empty for any.
    """

    instructions: tuple[str, ...]
    samples_BSF: Tensor
    labels_BS: Tensor
    policies: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.instructions)

    @classmethod
    def join(cls, parts: Sequence[Condition]) -> Condition:
        """Joins conditions with equally many samples."""
        return cls(
            instructions=tuple(text for part in parts for text in part.instructions),
            samples_BSF=torch.cat([part.samples_BSF for part in parts]),
            labels_BS=torch.cat([part.labels_BS for part in parts]),
            policies=tuple(name for part in parts for name in part.policies),
        )

    def to(self, device: torch.device) -> Self:
        """Copies the condition to another device."""
        return replace(self, samples_BSF=self.samples_BSF.to(device), labels_BS=self.labels_BS.to(device))

    def first(self, num: int) -> Self:
        """Returns the conditions of the first `num` networks."""
        return replace(
            self,
            instructions=self.instructions[:num],
            samples_BSF=self.samples_BSF[:num],
            labels_BS=self.labels_BS[:num],
            policies=self.policies[:num],
        )

    def take(self, index_N: Tensor) -> Self:
        """Selects conditions by index, in this order; an index may occur several times."""
        places = index_N.tolist()
        return replace(
            self,
            instructions=tuple(self.instructions[place] for place in places),
            samples_BSF=self.samples_BSF[index_N],
            labels_BS=self.labels_BS[index_N],
            policies=tuple(self.policies[place] for place in places) if self.policies else (),
        )

    def repeat(self, num: int) -> Self:
        """Repeats each network's condition `num` times in a row: `(B * num, ...)`."""
        return replace(
            self,
            instructions=tuple(text for text in self.instructions for _ in range(num)),
            samples_BSF=self.samples_BSF.repeat_interleave(num, dim=0),
            labels_BS=self.labels_BS.repeat_interleave(num, dim=0),
            policies=tuple(name for name in self.policies for _ in range(num)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightBatch:
    """B checkpoints of one layout, with their conditions.

    Attributes:
        values_BD: Flat vectors, float32.
        layout: Layout of the checkpoints.
        module: A network of this layout that generated weights are run through; its own values are not used.
        condition: The condition of the generator; its samples are drawn from training data.
        query: Further labelled samples of the same tasks, for losses on the outputs of networks.
        sample_index_B: Global index of each sample in the run, int64; keys its noise.
        targets_BAD: k evenly spaced states of each network's trajectory, of which `values_BD` is the last; None unless
            the generator needs them.
    """

    values_BD: Tensor
    layout: Layout
    module: nn.Module
    condition: Condition
    query: Condition
    sample_index_B: Tensor
    targets_BAD: Tensor | None = None

    @classmethod
    def join(cls, parts: Sequence[WeightBatch]) -> WeightBatch:
        """Joins batches of one layout."""
        targets = [part.targets_BAD for part in parts if part.targets_BAD is not None]
        return replace(
            parts[0],
            values_BD=torch.cat([part.values_BD for part in parts]),
            condition=Condition.join([part.condition for part in parts]),
            query=Condition.join([part.query for part in parts]),
            sample_index_B=torch.cat([part.sample_index_B for part in parts]),
            targets_BAD=torch.cat(targets) if targets else None,
        )

    def first(self, num: int) -> Self:
        """Returns the first `num` networks of the batch."""
        return replace(
            self,
            values_BD=self.values_BD[:num],
            condition=self.condition.first(num),
            query=self.query.first(num),
            sample_index_B=self.sample_index_B[:num],
            targets_BAD=None if self.targets_BAD is None else self.targets_BAD[:num],
        )

    def take(self, index_N: Tensor) -> Self:
        """Selects networks by index, in this order."""
        return replace(
            self,
            values_BD=self.values_BD[index_N],
            condition=self.condition.take(index_N),
            query=self.query.take(index_N),
            sample_index_B=self.sample_index_B[index_N],
            targets_BAD=None if self.targets_BAD is None else self.targets_BAD[index_N],
        )
