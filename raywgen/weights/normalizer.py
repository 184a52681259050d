"""Normalisers: base and scale of each tensor, by which weights become values of about unit size."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from raywgen.weights.layout import Layout
from raywgen.weights.tensors import TensorSpec
from raywgen.weights.vector_file import fetch_vector, map_vector

_LEAST_SCALE = 1e-6
# A dead channel's variance is zero, which has no logarithm.
_LEAST_VARIANCE = 1e-6
_MOST_LOG = 60.0
_VECTOR_SCALE = 0.5


class Normalizer(nn.Module):
    """`normalised = (values - base) / scale`, running variances by their logarithms, so that they stay positive.

    It keeps one base and one scale for each tensor, so its size does not depend on that of the network. The exception
    is a start that networks share, which takes the place of all bases; it may be mapped from a file.

    Args:
        layout: Layout of the networks.
        base_N: Mean of each tensor `(N,)`; of no effect where there is a shared start.
        scale_N: Standard deviation of each tensor's difference to the base, `(N,)`.
        start_D: The start that the layout's networks share; None if each begins on its own.
    """

    base_N: Tensor
    scale_N: Tensor
    start_D: Tensor | None
    _stop_N: Tensor
    _is_log_N: Tensor

    def __init__(self, layout: Layout, base_N: Tensor, scale_N: Tensor, start_D: Tensor | None = None) -> None:
        super().__init__()
        assert len(base_N) == len(scale_N) == len(layout.generated)
        self._sizes = [spec.num_values for spec in layout.generated]
        kinds = [spec.kind == "running_var" for spec in layout.generated]
        self._has_logs = any(kinds)
        self._start_file, self._start_source = "", ""
        tensors = {
            "base_N": base_N,
            "scale_N": scale_N,
            "start_D": start_D,
            "_stop_N": torch.tensor(self._sizes, device=base_N.device).cumsum(0),
            "_is_log_N": torch.tensor(kinds, device=base_N.device),
        }
        for name, tensor in tensors.items():
            # The bundle keeps them beside the parameters, as checkpoints of a run need none.
            self.register_buffer(name, tensor, persistent=False)

    @classmethod
    def measure(cls, layout: Layout, values_ND: Tensor, start_D: Tensor | None) -> Self:
        """Takes mean and scale of each tensor from N training networks, about their shared start if they have one."""
        means, scales = [], []
        sizes = [spec.num_values for spec in layout.generated]
        starts = [None] * len(sizes) if start_D is None else start_D.split(sizes)
        for spec, part_NX, start_X in zip(layout.generated, values_ND.split(sizes, dim=1), starts, strict=True):
            seen_NX = cls.in_units(spec, part_NX)
            about = seen_NX.mean() if start_X is None else cls.in_units(spec, start_X)
            is_empty = not part_NX.numel()
            means.append(seen_NX.new_zeros(()) if is_empty else seen_NX.mean())
            scales.append(seen_NX.new_ones(()) if is_empty else (seen_NX - about).std(unbiased=False))
        return cls.from_units(layout, torch.stack(means), torch.stack(scales), start_D)

    @classmethod
    def from_units(cls, layout: Layout, mean_N: Tensor, deviation_N: Tensor, start_D: Tensor | None) -> Self:
        """Returns the normaliser with these means and deviations of the tensors, as `in_units` gives their values."""
        bases = [
            _exp(mean) if spec.kind == "running_var" else mean
            for spec, mean in zip(layout.generated, mean_N, strict=True)
        ]
        base_N = torch.stack(bases) if bases and start_D is None else torch.zeros_like(mean_N)
        return cls(layout, base_N, deviation_N.clamp(min=_LEAST_SCALE), start_D)

    @staticmethod
    def in_units(spec: TensorSpec, values: Tensor) -> Tensor:
        """Returns values of a tensor as mean and deviation are taken: running variances by their logarithms."""
        return _log(values) if spec.kind == "running_var" else values

    @property
    def start_file(self) -> str:
        """The file that `start_D` is mapped from; empty where it is held in memory."""
        return self._start_file

    def with_start_file(self, path: str | Path, source: str = "") -> Normalizer:
        """Returns the same normaliser about the start in a file, which is mapped here and where it is unpickled.

        Args:
            path: The file.
            source: URI that nodes without the file fetch it from.
        """
        about = self.copy()
        about._start_file, about._start_source = str(Path(path).absolute()), source
        about.start_D = map_vector(path, sum(self._sizes))
        return about

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out a start that is mapped from a file: who unpickles it maps it too."""
        state = dict(self.__dict__)
        if self._start_file:
            state["_buffers"] = {**self._buffers, "start_D": None}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._start_file:
            if self._start_source:
                fetch_vector(self._start_source, self._start_file)
            self.start_D = map_vector(self._start_file, sum(self._sizes))

    def copy(self) -> Normalizer:
        """Returns one that can be moved to another device on its own; the tensors are shared until then."""
        twin = copy.copy(self)
        twin._buffers = dict(self._buffers)
        return twin

    def normalise(self, values: Tensor, position_BX: Tensor | None = None) -> Tensor:
        """Converts weights to normalised values.

        Args:
            values: Whole flat vectors `(..., D)`, or with `position_BX` values of any part of them.
            position_BX: Position in the flat vector of each value, int64, of a shape that broadcasts with `values`.
        """
        base, scale, is_log = self._numbers(position_BX)
        return (_by_log(values, is_log) - _by_log(base, is_log)) / scale

    def denormalise(self, normalised: Tensor, position_BX: Tensor | None = None) -> Tensor:
        """Converts normalised values to weights; the arguments are those of `normalise`."""
        base, scale, is_log = self._numbers(position_BX)
        return _from_log(normalised * scale + _by_log(base, is_log), is_log)

    @property
    def base_D(self) -> Tensor:
        """The base of each value `(D,)`."""
        return self._numbers(None)[0]

    @property
    def scale_D(self) -> Tensor:
        """The scale of each value `(D,)`."""
        return self._numbers(None)[1]

    def _numbers(self, position_BX: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Base and scale at some positions, and whether the logarithm is taken; None for nowhere."""
        if position_BX is None:
            counts_N = self._stop_N.diff(prepend=self._stop_N.new_zeros(1))
            tensor_X = torch.repeat_interleave(counts_N, output_size=sum(self._sizes))
        else:
            tensor_X = torch.searchsorted(self._stop_N, position_BX, right=True)
        is_log = self._is_log_N[tensor_X] if self._has_logs else None
        if self.start_D is None:
            return self.base_N[tensor_X], self.scale_N[tensor_X], is_log
        start = self.start_D if position_BX is None else self.start_D[position_BX]
        return start, self.scale_N[tensor_X], is_log


NormalizerTable = Mapping[str, tuple[Layout, Normalizer]]
"""Layout id -> the layout and its normaliser."""


def layout_normalizer(layout: Layout, start_D: Tensor | None = None, device: torch.device | None = None) -> Normalizer:
    """Returns base and scale that follow from shapes and kinds alone, not from the values of any network.

    Weights are in units of `sqrt(2 / fan in)` (He et al. 2015, eq. 10); norm scales and running variances lie around 1.

    Args:
        layout: Layout of the networks.
        start_D: The base if networks share their start.
        device: The device of the normaliser.
    """
    around_one = ("norm_scale", "running_var")
    return Normalizer(
        layout,
        base_N=torch.tensor([float(spec.kind in around_one) for spec in layout.generated], device=device),
        scale_N=torch.tensor([_scale_of(spec) for spec in layout.generated], device=device),
        start_D=start_D,
    )


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
    is_relative = any(normalizer.start_D is not None for _, normalizer in known.values())
    bases, scales = [], []
    for index, spec in enumerate(layout.generated):
        depth = index / max(1, len(layout.generated) - 1)
        models = [_most_alike(spec, depth, other, normalizer) for other, normalizer in known.values()]
        best = min(rank for rank, *_ in models)
        chosen = [(base, scale) for rank, base, scale in models if rank[:2] == best[:2]]
        base = torch.stack([base for base, _ in chosen]).mean()
        bases.append(_exp(base) if spec.kind == "running_var" else base)
        scales.append(torch.stack([scale for _, scale in chosen]).mean())
    if is_relative:
        resized_D = _resized_start(layout, known)
        start_D = start_D if resized_D is None else resized_D
    return Normalizer(layout, torch.stack(bases), torch.stack(scales), start_D if is_relative else None)


def _most_alike(
    spec: TensorSpec, depth: float, layout: Layout, normalizer: Normalizer
) -> tuple[tuple[bool, bool, float], Tensor, Tensor]:
    """Returns rank (lower is more similar), base as generators see it, and scale of the most similar tensor."""
    last = max(1, len(layout.generated) - 1)
    ranks = [
        (other.kind != spec.kind, other.shape != spec.shape, abs(index / last - depth))
        for index, other in enumerate(layout.generated)
    ]
    nearest = min(range(len(ranks)), key=ranks.__getitem__)
    base = normalizer.base_N[nearest]
    return (
        ranks[nearest],
        _log(base) if layout.generated[nearest].kind == "running_var" else base,
        normalizer.scale_N[nearest],
    )


def _resized_start(layout: Layout, known: NormalizerTable) -> Tensor | None:
    """Resizes the shared start of the known layout whose widths differ least; None if all differ in more."""
    found: list[tuple[float, Tensor]] = []
    for other, normalizer in known.values():
        pairs = list(zip(other.generated, layout.generated, strict=False))
        same_number = len(other.generated) == len(layout.generated)
        start_D = normalizer.start_D
        if not same_number or start_D is None or not all(_differ_in_width(*pair) for pair in pairs):
            continue
        parts = start_D.split([spec.num_values for spec in other.generated])
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
            place_B = (torch.arange(b, device=values.device) * a / b).round().long().clamp(max=a - 1)
            values = values.index_select(dim, place_B)
    return values.reshape(-1)


def _scale_of(spec: TensorSpec) -> float:
    return math.sqrt(2 / math.prod(spec.shape[1:])) if len(spec.shape) > 1 and spec.num_values else _VECTOR_SCALE


def _by_log(values: Tensor, is_log: Tensor | None) -> Tensor:
    return values if is_log is None else torch.where(is_log, _log(values), values)


def _from_log(values: Tensor, is_log: Tensor | None) -> Tensor:
    if is_log is None:
        return values
    # The branch not taken must not overflow, or its gradient would be NaN; and no logarithm may be that of zero.
    return torch.where(is_log, _exp(torch.where(is_log, values, 0.0)), values)


def _log(values: Tensor) -> Tensor:
    return values.clamp(min=_LEAST_VARIANCE).log()


def _exp(values: Tensor) -> Tensor:
    return values.clamp(-_MOST_LOG, _MOST_LOG).exp()
