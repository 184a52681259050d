"""Accumulates sums of every tensor of a layout over checkpoints, from which mean and standard deviation follow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import NotRequired, Self, TypedDict

import torch
from torch import Tensor

from raywgen.weights import Layout
from raywgen.weights.normalizer import Normalizer
from raywgen.weights.tensors import real_values

_BLOCK_VALUES = 1 << 16
Sums = tuple[int, float, float]
"""Number of values, their sum, and the sum of their squares."""


class StatisticsJson(TypedDict):
    """The form of `LayoutStatistics` in JSON."""

    num_checkpoints: int
    sums: dict[str, list[float]]
    logs: NotRequired[dict[str, list[float]]]


class LayoutStatisticsJson(StatisticsJson):
    """The sums over all checkpoints of a layout, and over those of each split."""

    splits: NotRequired[dict[str, StatisticsJson]]


@dataclass(frozen=True, slots=True)
class LayoutStatistics:
    """Sums over checkpoints of one layout.

    Attributes:
        num_checkpoints: Number of checkpoints.
        sums: Number of values, sum, and sum of squares of each generated tensor.
        logs: The same of the logarithms of each running variance, which generators write.
    """

    num_checkpoints: int
    sums: dict[str, Sums]
    logs: dict[str, Sums] = field(default_factory=dict)

    @classmethod
    def measure(cls, layout: Layout, packed_NP: Tensor) -> Self:
        """Sums over packed checkpoints uint8 `(N, P)`."""
        sums, logs = {}, {}
        state = layout.unpack(packed_NP)
        for spec in layout.generated:
            values = real_values(state[spec.name]).reshape(-1)
            sums[spec.name] = (values.numel(), *_sums(values))
            if spec.kind == "running_var":
                logs[spec.name] = (values.numel(), *_sums(Normalizer.in_units(spec, values.double())))
        return cls(len(packed_NP), sums, logs)

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
        names = [
            (ours.name, theirs.name)
            for ours, theirs in zip(layout.arranged_like(network).generated, network.generated, strict=True)
        ]
        sums, logs = ({new: old[name] for name, new in names if name in old} for old in (self.sums, self.logs))
        return LayoutStatistics(self.num_checkpoints, sums, logs)

    def __add__(self, other: LayoutStatistics) -> LayoutStatistics:
        return LayoutStatistics(
            self.num_checkpoints + other.num_checkpoints, _add(self.sums, other.sums), _add(self.logs, other.logs)
        )

    def moments(self) -> dict[str, tuple[float, float]]:
        """Returns mean and standard deviation of each tensor's values."""
        return {name: mean_and_spread(sums) for name, sums in self.sums.items()}

    def to_json(self) -> StatisticsJson:
        """Returns the JSON object of journals and the manifest."""
        return {
            "num_checkpoints": self.num_checkpoints,
            "sums": {name: list(row) for name, row in self.sums.items()},
            "logs": {name: list(row) for name, row in self.logs.items()},
        }

    @classmethod
    def from_json(cls, content: StatisticsJson) -> Self:
        """Reads what `to_json` wrote; earlier versions kept no sums of logarithms."""
        sums, logs = (
            {name: (int(row[0]), row[1], row[2]) for name, row in rows.items()}
            for rows in (content["sums"], content.get("logs", {}))
        )
        return cls(content["num_checkpoints"], sums, logs)


Statistics = dict[tuple[str, str], LayoutStatistics]
"""Layout or form id and split -> sums; the split is empty where an earlier version did not tell splits apart."""


def add_statistics(known: Statistics, key: tuple[str, str], sums: LayoutStatistics) -> None:
    """Adds sums to those that are known of the same layout and split."""
    known[key] = known[key] + sums if key in known else sums


def statistics_to_json(statistics: Statistics) -> dict[str, LayoutStatisticsJson]:
    """Returns the JSON objects of journals and the manifest by layout: sums over all splits, and over each."""
    by_layout: dict[str, dict[str, LayoutStatistics]] = {}
    for (layout_id, split), sums in statistics.items():
        by_layout.setdefault(layout_id, {})[split] = sums
    return {
        layout_id: {
            **reduce(add, splits.values()).to_json(),
            "splits": {split: sums.to_json() for split, sums in splits.items()},
        }
        for layout_id, splits in by_layout.items()
    }


def statistics_from_json(content: Mapping[str, LayoutStatisticsJson]) -> Statistics:
    """Reads what `statistics_to_json` wrote."""
    return {
        (layout_id, split): LayoutStatistics.from_json(sums)
        for layout_id, row in content.items()
        for split, sums in row.get("splits", {"": row}).items()
    }


def mean_and_spread(sums: Sums) -> tuple[float, float]:
    """Returns mean and standard deviation of values from their number, sum and sum of squares."""
    count, total, squares = sums
    mean = total / max(count, 1)
    return mean, math.sqrt(max(squares / max(count, 1) - mean * mean, 0.0))


def _add(one: dict[str, Sums], other: dict[str, Sums]) -> dict[str, Sums]:
    both = ((name, one[name], other[name]) for name in one if name in other)
    return {name: (a[0] + b[0], a[1] + b[1], a[2] + b[2]) for name, a, b in both}


def _sums(values: Tensor) -> tuple[float, float]:
    """Returns sum and sum of squares, computed in blocks that fit the cache, shifted by a mean to limit rounding."""
    if not values.numel():
        return 0.0, 0.0
    shift = float(_wide(values[:_BLOCK_VALUES], is_small=values.numel() <= _BLOCK_VALUES).mean())
    if math.isfinite(shift):
        total = squares = 0.0
        for block in values.split(_BLOCK_VALUES):
            block = _wide(block, is_small=values.numel() <= _BLOCK_VALUES) - shift
            total += float(block.sum())
            squares += float(torch.dot(block, block))
        squares += shift * (2 * total + shift * values.numel())
        total += shift * values.numel()
        if math.isfinite(total) and math.isfinite(squares):
            return total, squares
    blocks = [block.double() for block in values.split(_BLOCK_VALUES)]
    return sum(float(block.sum()) for block in blocks), sum(float(block.square().sum()) for block in blocks)


def _wide(block: Tensor, *, is_small: bool) -> Tensor:
    return block.double() if is_small or block.dtype == torch.float64 else block.float()
