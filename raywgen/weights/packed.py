"""One checkpoint in the packed form of its layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from raywgen.weights.errors import WeightsError
from raywgen.weights.layout import Layout
from raywgen.weights.nested import split_prefix
from raywgen.weights.tensors import find_ties


@dataclass(frozen=True, slots=True)
class PackedCheckpoint:
    """One checkpoint as bytes.

    Attributes:
        layout: Layout of the checkpoint; its names do not have the `prefix`.
        packed_P: The packed form, uint8.
        prefix: The prefix that a wrapper had put before every name.
        metadata: Metadata of the file, if its format has any.
    """

    layout: Layout
    packed_P: np.ndarray
    prefix: str
    metadata: Mapping[str, str] = field(default_factory=dict)


def pack(state_dict: Mapping[str, Tensor], source: str) -> PackedCheckpoint:
    """Packs a `state_dict` and splits off the prefix of its names.

    Raises:
        WeightsError: A tensor is not dense.
    """
    prefix, names = split_prefix(list(state_dict))
    state = dict(zip(names, state_dict.values(), strict=True))
    ties = find_ties(state)
    if sparse := [name for name, tensor in state.items() if not _is_dense(tensor)]:
        raise WeightsError(f"{source}: tensor '{sparse[0]}' is sparse, quantised, nested or on 'meta'; save it dense")
    plain = {name: _plain(tensor) for name, tensor in state.items() if name not in ties}
    state = {name: plain[ties.get(name, name)] for name in state}
    layout = Layout.from_state_dict(state)
    return PackedCheckpoint(layout, layout.pack(state).numpy(), prefix)


def written_bytes(tensor: Tensor) -> int:
    """Returns the number of bytes that all values of a tensor take when written out."""
    return tensor.numel() * tensor.element_size() if _is_dense(tensor) else 0


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_nested or tensor.is_meta)


def _plain(tensor: Tensor) -> Tensor:
    """Copies the values in order: torch calls a single value of any stride contiguous, yet cannot view its bytes."""
    return tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
