"""Finds constant tensors, which are not learned and need not be finite: masks, and tables that the user names."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from raywgen.corpus.statistics import LayoutStatistics
from raywgen.weights import Layout
from raywgen.weights.masks import alike, masks, may_be_mask
from raywgen.weights.tensors import real_values

# A mask has at least one value of -1e4.
_LEAST_SQUARE = 1e8


def find_constants(
    layout: Layout, packed_NP: Tensor, statistics: LayoutStatistics, patterns: Sequence[str] = ()
) -> set[str]:
    """Returns the names of the tensors that are copied instead of generated.

    These are the tensors that a pattern names, masks (see `masks`), and tables with infinities that are equal in
    several networks. Checkpoints with NaN in a tensor are ignored here, because they are set aside.

    Args:
        layout: Layout of the checkpoints.
        packed_NP: Packed weights of the checkpoints.
        statistics: Statistics of the checkpoints; tensors whose sums rule out a mask are not examined.
        patterns: Names of tensors, with `*` and `?` as in file names.
    """
    named = {spec.name for spec in layout.generated if any(fnmatchcase(spec.name, pattern) for pattern in patterns)}
    doubtful = [
        spec
        for spec in layout.generated
        if spec.name not in named and may_be_mask(spec.name) and not statistics.sums[spec.name][2] < _LEAST_SQUARE
    ]
    if not doubtful:
        return named
    state = layout.unpack(packed_NP)
    return named | {spec.name for spec in doubtful if not spec.torch_dtype.is_complex and _is_fixed(state[spec.name])}


def with_nan(layout: Layout, packed_NP: Tensor, names: Iterable[str]) -> dict[int, str]:
    """Finds checkpoints that hold NaN in a constant; returns the name of the tensor by their index."""
    state = layout.unpack(packed_NP)
    found: dict[int, str] = {}
    for name in names:
        nan_N = real_values(state[name]).float().reshape(len(packed_NP), -1).isnan().any(dim=1)
        found |= dict.fromkeys(nan_N.nonzero().flatten().tolist(), name)
    return found


def _is_fixed(tensor: Tensor) -> bool:
    values_NX = tensor.reshape(len(tensor), -1)
    values_NX = values_NX if values_NX.dtype == torch.float64 else values_NX.float()
    values_NX = values_NX[~values_NX.isnan().any(dim=1)]
    if not len(values_NX):
        return False
    return bool(masks(values_NX).all()) or (alike(values_NX) and not math.isfinite(float(values_NX.sum())))


def why_not_finite(layout: Layout, name: str, packed_P: Tensor) -> str:
    """Describes a tensor that holds NaN or infinity, and how to accept it all the same."""
    values = real_values(layout.unpack(packed_P)[name]).float()
    if bool(values.isnan().any()) or not may_be_mask(name):
        return f"tensor '{name}' holds NaN or infinity"
    return (
        f"tensor '{name}' holds infinity; if the architecture has it so (a mask, a table), take it by "
        f"`--constant '{name}'`: it is then kept and never generated"
    )
