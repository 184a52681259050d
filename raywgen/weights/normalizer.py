"""Normalisers: base and scale of each tensor, by which weights become values of about unit size."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from raywgen.weights.layout import Layout
from raywgen.weights.tensors import TensorSpec

_LEAST_SCALE = 1e-6
# A dead channel's variance is zero, which has no logarithm.
_LEAST_VARIANCE = 1e-6
_MOST_LOG = 60.0
_VECTOR_SCALE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Normalizer:
    """`normalised = (values - base) / scale`, running variances by their logarithms, so that they stay positive.

    Attributes:
        base_D: The shared start of the layout's networks; the mean of each tensor if there is no shared start.
        scale_D: Standard deviation of the difference to the base, one number per tensor, repeated for its values.
        log_D: Whether the logarithm of a value is taken, bool; None for no value.
    """

    base_D: Tensor
    scale_D: Tensor
    log_D: Tensor | None = None

    @classmethod
    def measure(cls, layout: Layout, values_ND: Tensor, base_D: Tensor | None) -> Self:
        """Takes mean and scale of each tensor from N training networks."""
        log_D = variances(layout)
        seen_ND = _by_log(values_ND, log_D)
        sizes = [spec.num_values for spec in layout.generated]
        if base_D is None:
            means = [part_NX.mean() for part_NX in seen_ND.split(sizes, dim=1)]
            base_D = _from_log(_spread(means, sizes), log_D)
        offset_ND = seen_ND - _by_log(base_D, log_D)
        scales = [part_NX.std(unbiased=False).clamp(min=_LEAST_SCALE) for part_NX in offset_ND.split(sizes, dim=1)]
        return cls(base_D=base_D, scale_D=_spread(scales, sizes), log_D=log_D)

    def normalise(self, values_BD: Tensor) -> Tensor:
        """Converts weights to normalised values."""
        return (_by_log(values_BD, self.log_D) - _by_log(self.base_D, self.log_D)) / self.scale_D

    def denormalise(self, normalised_BD: Tensor) -> Tensor:
        """Converts normalised values to weights."""
        return _from_log(normalised_BD * self.scale_D + _by_log(self.base_D, self.log_D), self.log_D)


NormalizerTable = Mapping[str, tuple[Layout, Normalizer]]
"""Layout id -> the layout and its normaliser."""


def variances(layout: Layout) -> Tensor | None:
    """Returns which values are running variances, bool `(D,)`; None if the layout has none."""
    kinds = [spec.kind == "running_var" for spec in layout.generated]
    if not any(kinds):
        return None
    sizes = [spec.num_values for spec in layout.generated]
    return torch.cat([torch.full((size,), kind) for size, kind in zip(sizes, kinds, strict=True)])


def layout_normalizer(layout: Layout, start_D: Tensor | None = None) -> Normalizer:
    """Returns base and scale that follow from shapes and kinds alone, not from the values of any network.

    Weights are in units of `sqrt(2 / fan in)` (He et al. 2015, eq. 10); norm scales and running variances lie around 1.

    Args:
        layout: Layout of the networks.
        start_D: The base if networks share their start.
    """
    around_one = ("norm_scale", "running_var")
    return Normalizer(
        base_D=_spread_of(layout, lambda spec: float(spec.kind in around_one)) if start_D is None else start_D,
        scale_D=_spread_of(layout, _scale_of),
        log_D=variances(layout),
    )


def shares_start(layout: Layout, normalizer: Normalizer) -> bool:
    """Whether the base of a normaliser is a network, instead of one number per tensor."""
    sizes = [spec.num_values for spec in layout.generated]
    return any(bool((part != part[0]).any()) for part in normalizer.base_D.split(sizes) if len(part))


def normalizer_of_similar(layout: Layout, known: NormalizerTable, start_D: Tensor) -> Normalizer:
    """Estimates a normaliser for a new layout: each tensor takes that of the most similar tensor of every known layout.

    Tensors are compared by kind first, then by shape, then by their relative depth in the network.

    Args:
        layout: The layout without a normaliser.
        known: Normalisers of other layouts.
        start_D: The base if the known networks share their starts and each differs from this one in more than its
            widths. If one differs in its widths alone, the base is its start, resized to these widths: a generator
            writes differences from that start, unit by unit, which are meaningless relative to another start. If they
            do not share their starts, the base is estimated as the scale is.
    """
    is_relative = any(shares_start(other, normalizer) for other, normalizer in known.values())
    sizes = [spec.num_values for spec in layout.generated]
    bases, scales = [], []
    for index, spec in enumerate(layout.generated):
        place = index / max(1, len(sizes) - 1)
        models = [_most_alike(spec, place, other, normalizer) for other, normalizer in known.values()]
        best = min(rank for rank, *_ in models)
        chosen = [(base, scale) for rank, base, scale in models if rank[:2] == best[:2]]
        bases.append(torch.stack([base for base, _ in chosen]).mean())
        scales.append(torch.stack([scale for _, scale in chosen]).mean())
    log_D = variances(layout)
    if is_relative:
        resized_D = _resized_start(layout, known)
        base_D = start_D if resized_D is None else resized_D
    else:
        base_D = _from_log(_spread(bases, sizes), log_D)
    return Normalizer(base_D=base_D, scale_D=_spread(scales, sizes), log_D=log_D)


def _most_alike(
    spec: TensorSpec, place: float, layout: Layout, normalizer: Normalizer
) -> tuple[tuple[bool, bool, float], Tensor, Tensor]:
    """Returns rank (lower is more similar), base as generators see it, and scale of the most similar tensor."""
    last = max(1, len(layout.generated) - 1)
    ranks = [
        (other.kind != spec.kind, other.shape != spec.shape, abs(index / last - place))
        for index, other in enumerate(layout.generated)
    ]
    nearest = min(range(len(ranks)), key=ranks.__getitem__)
    first = sum(before.num_values for before in layout.generated[:nearest])
    base_D = _by_log(normalizer.base_D, normalizer.log_D)
    return ranks[nearest], base_D[first], normalizer.scale_D[first]


def _resized_start(layout: Layout, known: NormalizerTable) -> Tensor | None:
    """Resizes the shared start of the known layout whose widths differ least; None if all differ in more."""
    found: list[tuple[float, Tensor]] = []
    for other, normalizer in known.values():
        pairs = list(zip(other.generated, layout.generated, strict=False))
        same_number = len(other.generated) == len(layout.generated)
        if not same_number or not shares_start(other, normalizer) or not all(_differ_in_width(*pair) for pair in pairs):
            continue
        parts = normalizer.base_D.split([spec.num_values for spec in other.generated])
        resized = [_resized(part, old.shape, new.shape) for part, (old, new) in zip(parts, pairs, strict=True)]
        far = sum(abs(math.log(b / a)) for old, new in pairs for a, b in zip(old.shape, new.shape, strict=True))
        found.append((far, torch.cat(resized)))
    return min(found, key=lambda pair: pair[0])[1] if found else None


def _differ_in_width(old: TensorSpec, new: TensorSpec) -> bool:
    """Whether two tensors differ in their rows and columns alone."""
    same_rank = len(old.shape) == len(new.shape) and 0 not in (*old.shape, *new.shape)
    return old.kind == new.kind and same_rank and old.shape[2:] == new.shape[2:]


def _resized(values_X: Tensor, old: tuple[int, ...], new: tuple[int, ...]) -> Tensor:
    """Takes rows and columns at the same relative positions, which is how a generator encodes positions."""
    values = values_X.view(old)
    for dim, (a, b) in enumerate(zip(old, new, strict=True)):
        if a != b:
            place_B = (torch.arange(b) * a / b).round().long().clamp(max=a - 1)
            values = values.index_select(dim, place_B)
    return values.reshape(-1)


def _scale_of(spec: TensorSpec) -> float:
    return math.sqrt(2 / math.prod(spec.shape[1:])) if len(spec.shape) > 1 and spec.num_values else _VECTOR_SCALE


def _by_log(values: Tensor, log_D: Tensor | None) -> Tensor:
    return values if log_D is None else torch.where(log_D, values.clamp(min=_LEAST_VARIANCE).log(), values)


def _from_log(values: Tensor, log_D: Tensor | None) -> Tensor:
    if log_D is None:
        return values
    # The branch not taken must not overflow, or its gradient would be NaN; and no logarithm may be that of zero.
    return torch.where(log_D, torch.where(log_D, values, 0.0).clamp(-_MOST_LOG, _MOST_LOG).exp(), values)


def _spread(numbers: list[Tensor], sizes: list[int]) -> Tensor:
    """Repeats one number per tensor for each of its values."""
    return torch.cat([number.expand(size) for number, size in zip(numbers, sizes, strict=True)])


def _spread_of(layout: Layout, number_of: Callable[[TensorSpec], float]) -> Tensor:
    return torch.cat([torch.full((spec.num_values,), number_of(spec)) for spec in layout.generated])
