"""Brings trained residual networks to another depth or other widths by hand, without any training.

Shape letters beyond the legend in `raywgen.weights`: N networks of a row.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from raywgen.weights import Layout

_BLOCK = re.compile(r"(layer\d+)\.(\d+)\.(.+)")


class StretchError(ValueError):
    """A network cannot be brought to a depth; the message says why."""


def stretched(values_ND: Tensor, layout: Layout, wanted: Layout) -> Tensor:
    """Makes networks `(N, D')` of another depth by repeating or leaving out residual blocks, evenly over each stage.

    Every stage keeps its first block, which alone changes the width; the others stay in order.

    Args:
        values_ND: Flat vectors of `layout`.
        layout: Layout of the networks; tensors of stage s and block b are named `layer{s}.{b}.*`.
        wanted: Layout of the other depth, with the same names.

    Raises:
        StretchError: There is no block to repeat.
    """
    num, num_wanted = num_blocks(layout), num_blocks(wanted)
    if num == 1 < num_wanted:
        raise StretchError("stages of a single block have none that could be repeated; take a deeper network")
    state_N = layout.unflatten(values_ND)

    def source(name: str) -> str:
        if (found := _BLOCK.fullmatch(name)) is None:
            return name
        stage, block, rest = found.groups()
        # Among the blocks after the first, the i-th of m' is the floor(i m / m')-th of m.
        place = int(block) and 1 + (int(block) - 1) * (num - 1) // (num_wanted - 1)
        return f"{stage}.{place}.{rest}"

    parts = [state_N[source(spec.name)].flatten(1).float() for spec in wanted.generated]
    return torch.cat(parts, dim=1)


def num_blocks(layout: Layout) -> int:
    """Returns the number of residual blocks of each stage."""
    found = [_BLOCK.fullmatch(spec.name) for spec in layout.tensors]
    return 1 + max(int(match[2]) for match in found if match is not None)


def widened(values_ND: Tensor, layout: Layout, wanted: Layout) -> Tensor:
    """Makes networks `(N, D')` of other widths by repeating channels, or leaving some out, evenly.

    Where a channel is repeated, whatever reads it takes an equal share from each copy, so that networks of twice the
    width compute the same ("Net2WiderNet", Chen et al. 2016, arXiv 1511.05641, section 2.2).

    Args:
        values_ND: Flat vectors of `layout`.
        layout: Layout of the networks.
        wanted: Layout of the other widths, with the same names.
    """
    state_N = layout.unflatten(values_ND)
    parts = []
    for spec in wanted.generated:
        tensor = state_N[spec.name].float()
        # The first two axes of a weight are the channels it writes and those it reads.
        for axis, size in enumerate(spec.shape[:2], start=1):
            have = tensor.shape[axis]
            source = torch.arange(size) * have // size
            tensor = tensor.index_select(axis, source)
            if axis == 2:
                copies = source.bincount(minlength=have)[source]
                tensor = tensor / copies.view(-1, *[1] * (tensor.dim() - 3))
        parts.append(tensor.flatten(1))
    return torch.cat(parts, dim=1)
