"""Accumulates mean and standard deviation of every tensor of a layout over checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self, TypedDict

import torch
from torch import Tensor

from raywgen.weights import Layout
from raywgen.weights.tensors import real_values

_BLOCK_VALUES = 1 << 16


class StatisticsJson(TypedDict):
    """The form of `LayoutStatistics` in JSON."""

    num_checkpoints: int
    sums: dict[str, list[float]]


@dataclass(frozen=True, slots=True)
class LayoutStatistics:
    """Sums over checkpoints of one layout.

    Attributes:
        num_checkpoints: Number of checkpoints.
        sums: Number of values, sum, and sum of squares of each generated tensor.
    """

    num_checkpoints: int
    sums: dict[str, tuple[int, float, float]]

    @classmethod
    def measure(cls, layout: Layout, packed_NP: Tensor) -> Self:
        """Sums over packed checkpoints uint8 `(N, P)`."""
        sums = {}
        state = layout.unpack(packed_NP)
        for spec in layout.generated:
            values = real_values(state[spec.name]).reshape(-1)
            if values.dtype != torch.float64:
                values = values.float()
            sums[spec.name] = (values.numel(), *_sums(values))
        return cls(len(packed_NP), sums)

    def non_finite(self, layout: Layout, packed_NP: Tensor) -> dict[int, str]:
        """Finds checkpoints with NaN or infinity, and a tensor that holds it; examines only tensors with such a sum."""
        found: dict[int, str] = {}
        # A float64 sum of finite float32 values never overflows; that of float64 values may, and is then examined.
        if all(math.isfinite(total) for _, total, _ in self.sums.values()):
            return found
        state = layout.unpack(packed_NP)
        for spec in layout.generated:
            if not math.isfinite(self.sums[spec.name][1]):
                tensor = real_values(state[spec.name]).reshape(len(packed_NP), -1)
                finite_N = torch.isfinite(tensor if tensor.dtype == torch.float64 else tensor.float()).all(dim=1)
                for index in (~finite_N).nonzero().flatten().tolist():
                    found.setdefault(index, spec.name)
        return found

    def named_as(self, layout: Layout, network: Layout) -> LayoutStatistics:
        """Returns the sums under the names of another form of the architecture, without those of its constants."""
        names = zip(layout.arranged_like(network).generated, network.generated, strict=True)
        sums = {theirs.name: self.sums[ours.name] for ours, theirs in names if ours.name in self.sums}
        return LayoutStatistics(self.num_checkpoints, sums)

    def __add__(self, other: LayoutStatistics) -> LayoutStatistics:
        both = (name for name in self.sums if name in other.sums)
        sums = {name: tuple(a + b for a, b in zip(self.sums[name], other.sums[name], strict=True)) for name in both}
        return LayoutStatistics(self.num_checkpoints + other.num_checkpoints, sums)  # pyright: ignore[reportArgumentType]

    def moments(self) -> dict[str, tuple[float, float]]:
        """Returns mean and standard deviation of each tensor's values."""
        result = {}
        for name, (count, total, squares) in self.sums.items():
            mean = total / max(count, 1)
            result[name] = (mean, math.sqrt(max(squares / max(count, 1) - mean * mean, 0.0)))
        return result

    def to_json(self) -> StatisticsJson:
        """Returns the JSON object of journals and the manifest."""
        return {"num_checkpoints": self.num_checkpoints, "sums": {name: list(row) for name, row in self.sums.items()}}

    @classmethod
    def from_json(cls, content: StatisticsJson) -> Self:
        """Reads what `to_json` wrote."""
        return cls(
            content["num_checkpoints"], {name: (int(row[0]), row[1], row[2]) for name, row in content["sums"].items()}
        )


def _sums(values: Tensor) -> tuple[float, float]:
    """Returns sum and sum of squares, computed in blocks that fit the cache, shifted by a mean to limit rounding."""
    if not values.numel():
        return 0.0, 0.0
    if values.numel() <= _BLOCK_VALUES:
        values = values.double()
    shift = float(values[:_BLOCK_VALUES].mean())
    if math.isfinite(shift):
        total = squares = 0.0
        for block in values.split(_BLOCK_VALUES):
            block = block - shift
            total += float(block.sum())
            squares += float(torch.dot(block, block))
        squares += shift * (2 * total + shift * values.numel())
        total += shift * values.numel()
        if math.isfinite(total) and math.isfinite(squares):
            return total, squares
    return float(values.double().sum()), float(values.double().square().sum())
