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
        is_dropped_B2: For which networks a generator reads no instruction, and no samples, bool; None for none. Heads
            that are fitted to the samples are so all the same.
    """

    instructions: tuple[str, ...]
    samples_BSF: Tensor
    labels_BS: Tensor
    policies: tuple[str, ...] = ()
    is_dropped_B2: Tensor | None = None

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
            is_dropped_B2=_joined([part.is_dropped_B2 for part in parts], [len(part) for part in parts]),
        )

    def reading(self, *, instruction: bool = True, samples: bool = True) -> Self:
        """Returns the condition from which a generator reads the instruction alone, the samples alone, both or none."""
        is_dropped_2 = torch.tensor([not instruction, not samples], device=self.labels_BS.device)
        return replace(self, is_dropped_B2=is_dropped_2.expand(len(self), 2))

    def to(self, device: torch.device) -> Self:
        """Copies the condition to another device."""
        return replace(
            self,
            samples_BSF=_moved(self.samples_BSF, device),
            labels_BS=_moved(self.labels_BS, device),
            is_dropped_B2=None if self.is_dropped_B2 is None else _moved(self.is_dropped_B2, device),
        )

    def first(self, num: int) -> Self:
        """Returns the conditions of the first `num` networks."""
        return replace(
            self,
            instructions=self.instructions[:num],
            samples_BSF=self.samples_BSF[:num],
            labels_BS=self.labels_BS[:num],
            policies=self.policies[:num],
            is_dropped_B2=None if self.is_dropped_B2 is None else self.is_dropped_B2[:num],
        )

    def take(self, index_N: Tensor) -> Self:
        """Selects conditions by index, in this order; an index may occur several times."""
        places, index_N = index_N.tolist(), index_N.to(self.labels_BS.device)
        return replace(
            self,
            instructions=tuple(self.instructions[place] for place in places),
            samples_BSF=self.samples_BSF[index_N],
            labels_BS=self.labels_BS[index_N],
            policies=tuple(self.policies[place] for place in places) if self.policies else (),
            is_dropped_B2=None if self.is_dropped_B2 is None else self.is_dropped_B2[index_N],
        )

    def repeat(self, num: int) -> Self:
        """Repeats each network's condition `num` times in a row: `(B * num, ...)`."""
        return replace(
            self,
            instructions=tuple(text for text in self.instructions for _ in range(num)),
            samples_BSF=self.samples_BSF.repeat_interleave(num, dim=0),
            labels_BS=self.labels_BS.repeat_interleave(num, dim=0),
            policies=tuple(name for name in self.policies for _ in range(num)),
            is_dropped_B2=None if self.is_dropped_B2 is None else self.is_dropped_B2.repeat_interleave(num, dim=0),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class HeaderIndex:
    """The header chunks that windows follow from, where chunks of a network's own scales come before those of values.

    Attributes:
        per: What shares a scale, as `raywgen.weights.groups` takes it.
        num_chunks: Number of a network's header chunks, by which its first chunk of values is counted.
        index_BY: Header chunks of each window, int64, in ascending order, as many of each; the last may be repeated.
    """

    per: str
    num_chunks: int
    index_BY: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """A window of each of B networks: consecutive chunks of its flat vector, as many of each.

    Attributes:
        chunk_length: K, values of a chunk.
        num_chunks: Chunks of a window, with those around it that its encoder needs.
        first_B: First chunk of each window, int64.
        inner_BW: Chunks `(B, W)` of the window without those around it; None if these are all. Positions in the
            network, as `index_BW` has them.
        header: The header chunks that each window follows from; None where networks have no header.
    """

    chunk_length: int
    num_chunks: int
    first_B: Tensor
    inner_BW: Tensor | None = None
    header: HeaderIndex | None = None

    @property
    def num_values(self) -> int:
        """X, the values of a window."""
        return self.num_chunks * self.chunk_length

    @property
    def index_BW(self) -> Tensor:
        """Position in its network of each chunk, int64 `(B, num_chunks)`."""
        return self.first_B.unsqueeze(1) + torch.arange(self.num_chunks, device=self.first_B.device)

    @property
    def start_B(self) -> Tensor:
        """Position in the flat vector of each window's first value, int64; negative for a window of header chunks."""
        num_before = 0 if self.header is None else self.header.num_chunks
        return (self.first_B - num_before) * self.chunk_length

    @property
    def position_BX(self) -> Tensor:
        """Position in the flat vector of each value, int64 `(B, X)`; it may lie beyond the ends of the network."""
        return self.start_B.unsqueeze(1) + torch.arange(self.num_values, device=self.first_B.device)

    @property
    def code_index_BX(self) -> Tensor:
        """The chunks whose tokens a batch holds, int64: those of the window, and the header chunks that it needs."""
        index_BX = self.index_BW if self.inner_BW is None else self.inner_BW
        return index_BX if self.header is None else torch.cat([index_BX, self.header.index_BY], dim=1)

    def with_header(self, header: HeaderIndex) -> Self:
        """Returns the same windows with header chunks."""
        return replace(self, header=header)

    def to(self, device: torch.device) -> Self:
        """Copies the windows to another device."""
        inner_BW = None if self.inner_BW is None else _moved(self.inner_BW, device)
        header = self.header
        if header is not None:
            header = replace(header, index_BY=_moved(header.index_BY, device))
        return replace(self, first_B=_moved(self.first_B, device), inner_BW=inner_BW, header=header)

    @classmethod
    def join(cls, parts: Sequence[Windows]) -> Windows:
        """Joins windows of equal length, none of which has a header."""
        assert all(part.header is None for part in parts)
        inner = [part.inner_BW for part in parts if part.inner_BW is not None]
        first_B = torch.cat([part.first_B for part in parts])
        return replace(parts[0], first_B=first_B, inner_BW=torch.cat(inner) if inner else None)

    def take(self, index_N: Tensor) -> Self:
        """Selects windows by index, in this order."""
        index_N = index_N.to(self.first_B.device)
        inner_BW = None if self.inner_BW is None else self.inner_BW[index_N]
        header = self.header
        if header is not None:
            header = replace(header, index_BY=header.index_BY[index_N])
        return replace(self, first_B=self.first_B[index_N], inner_BW=inner_BW, header=header)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightBatch:
    """B checkpoints of one layout, with their conditions.

    Attributes:
        values_BD: Flat vectors, float32; with `windows`, the values of these alone, and zeros beyond a network's ends.
        layout: Layout of the checkpoints.
        module: A network of this layout that generated weights are run through; its own values are not used. An empty
            module with `windows`.
        condition: The condition of the generator; its samples are drawn from training data.
        query: Further labelled samples of the same tasks, for losses on the outputs of networks.
        sample_index_B: Global index of each sample in the run, int64; keys its noise.
        targets_BAD: k evenly spaced states of each network's trajectory, of which `values_BD` is the last; None unless
            the generator needs them. With `windows`, the values of these alone.
        windows: The part of each network that the batch holds; None for whole networks.
        codes_BWL: Stored tokens of the windows (of their inner chunks, then of their header chunks) or of whole
            networks, int64, in place of values, of which there are then none, `(B, 0)`; None in a batch of values.
        moments_BYK: The moments of the windows' header chunks, by `raywgen.weights.groups`; None for windows without
            them, for whole networks, and in a batch of tokens.
    """

    values_BD: Tensor
    layout: Layout
    module: nn.Module
    condition: Condition
    query: Condition
    sample_index_B: Tensor
    targets_BAD: Tensor | None = None
    windows: Windows | None = None
    codes_BWL: Tensor | None = None
    moments_BYK: Tensor | None = None

    def __len__(self) -> int:
        return len(self.sample_index_B)

    @property
    def num_values(self) -> int:
        """Number of values that the batch holds or, where it holds tokens, that these stand for."""
        if self.codes_BWL is not None:
            return len(self) * (self.layout.num_values if self.windows is None else self.windows.num_values)
        return (self.values_BD if self.targets_BAD is None else self.targets_BAD).numel()

    def to(self, device: torch.device) -> Self:
        """Copies the batch to another device; the module, whose values are not used, stays where it is."""
        return replace(
            self,
            values_BD=_moved(self.values_BD, device),
            condition=self.condition.to(device),
            query=self.query.to(device),
            sample_index_B=_moved(self.sample_index_B, device),
            targets_BAD=None if self.targets_BAD is None else _moved(self.targets_BAD, device),
            windows=None if self.windows is None else self.windows.to(device),
            codes_BWL=None if self.codes_BWL is None else self.codes_BWL.to(device),
            moments_BYK=None if self.moments_BYK is None else _moved(self.moments_BYK, device),
        )

    def cut(self, windows: Windows, moments_BYK: Tensor | None = None) -> Self:
        """Returns the windows of a batch of whole networks.

        Args:
            windows: The windows.
            moments_BYK: The moments of their header chunks.
        """
        assert self.windows is None, "the batch holds windows already"
        if self.codes_BWL is not None:
            index_BX = windows.code_index_BX
            rows_B1 = torch.arange(len(index_BX), device=index_BX.device).unsqueeze(1)
            return replace(self, codes_BWL=self.codes_BWL[rows_B1, index_BX], windows=windows)
        position_BX = windows.position_BX
        is_real_BX = (position_BX >= 0) & (position_BX < self.layout.num_values)
        position_BX = position_BX.clamp(0, self.layout.num_values - 1)
        values_BX = self.values_BD.gather(1, position_BX) * is_real_BX
        targets = self.targets_BAD
        if targets is not None:
            position_BAX = position_BX.unsqueeze(1).expand(-1, targets.shape[1], -1)
            targets = targets.gather(2, position_BAX) * is_real_BX.unsqueeze(1)
        return replace(self, values_BD=values_BX, targets_BAD=targets, windows=windows, moments_BYK=moments_BYK)

    @classmethod
    def join(cls, parts: Sequence[WeightBatch]) -> WeightBatch:
        """Joins batches of one layout, of whole networks or of windows of equal length."""
        windows = [part.windows for part in parts if part.windows is not None]
        codes = [part.codes_BWL for part in parts if part.codes_BWL is not None]
        targets = [part.targets_BAD for part in parts if part.targets_BAD is not None]
        return replace(
            parts[0],
            values_BD=torch.cat([part.values_BD for part in parts]),
            condition=Condition.join([part.condition for part in parts]),
            query=Condition.join([part.query for part in parts]),
            sample_index_B=torch.cat([part.sample_index_B for part in parts]),
            targets_BAD=torch.cat(targets) if targets else None,
            windows=Windows.join(windows) if windows else None,
            codes_BWL=torch.cat(codes) if codes else None,
        )

    def first(self, num: int) -> Self:
        """Returns the first `num` networks of the batch."""
        return self.take(torch.arange(min(num, len(self)), device=self.sample_index_B.device))

    def take(self, index_N: Tensor) -> Self:
        """Selects networks by index, in this order."""
        own_N = index_N.to(self.sample_index_B.device)
        return replace(
            self,
            values_BD=self.values_BD[own_N],
            condition=self.condition.take(index_N),
            query=self.query.take(index_N),
            sample_index_B=self.sample_index_B[own_N],
            targets_BAD=None if self.targets_BAD is None else self.targets_BAD[own_N],
            windows=None if self.windows is None else self.windows.take(index_N),
            codes_BWL=None if self.codes_BWL is None else self.codes_BWL[index_N],
            moments_BYK=None if self.moments_BYK is None else self.moments_BYK[index_N],
        )


def _joined(parts: Sequence[Tensor | None], counts: Sequence[int]) -> Tensor | None:
    """Joins what is left out of conditions, of some of which nothing may be."""
    given = [part for part in parts if part is not None]
    if not given:
        return None
    pairs = zip(parts, counts, strict=True)
    return torch.cat([given[0].new_zeros(count, 2) if part is None else part for part, count in pairs])


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor to another device; to a GPU from pinned memory, so that nobody waits for the copy."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
