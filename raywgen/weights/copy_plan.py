"""Plans which bytes to copy from a weights file to the packed form, from the header of the file."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from raywgen.weights.errors import WeightsError
from raywgen.weights.inert_pickle import NotPlainError, TensorReference
from raywgen.weights.layout import Layout
from raywgen.weights.nested import split_prefix
from raywgen.weights.tensors import TensorSpec, kind_of

DTYPE_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F4": "float4_e2m1fn_x2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
}
"""The name in torch of each dtype of a safetensors file."""


SAFETENSORS_DTYPES = frozenset(DTYPE_NAMES.values())
"""The dtypes that a safetensors file can hold, by their names in torch."""


@dataclass(frozen=True, slots=True)
class CopyRange:
    """Copies `num_bytes` from byte `source` of an entry to byte `target` of the packed form."""

    entry: str
    source: int
    target: int
    num_bytes: int
    is_whole: bool = False
    """Whether this is the only copy from the entry and covers all of it."""


@dataclass(frozen=True, slots=True)
class CopyPlan:
    """The plan that all files of one architecture share.

    Attributes:
        layout: Layout of the network; its names do not have the `prefix`.
        prefix: The prefix that a wrapper had put before every name.
        copies: Byte ranges to copy, in the order of the packed form.
        entries: Number of bytes of each entry.
        doubles: Tensors that the metadata tie to another tensor though the file stores both: name, both starts, bytes.
        metadata: Metadata in the header of a safetensors file.
    """

    layout: Layout
    prefix: str
    copies: tuple[CopyRange, ...]
    entries: dict[str, int]
    doubles: tuple[tuple[str, int, int, int], ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)


def safetensors_plan(header: bytes, path: str) -> CopyPlan:
    """Plans the copies of a safetensors file from its header.

    Raises:
        WeightsError: The file is damaged, or holds no tensor or an unknown dtype.
    """
    try:
        with safe_open(path, "pt"):  # The library's own checks of offsets, overlaps and lengths.
            pass
        content: dict[str, Any] = json.loads(header)
        metadata: dict[str, str] = content.pop("__metadata__", None) or {}
        rows = [(name, row["dtype"], tuple(row["shape"]), row["data_offsets"]) for name, row in content.items()]
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise WeightsError(f"{path} is truncated or no safetensors file ({error}); fetch it again") from error
    if unknown := [dtype for _, dtype, _, _ in rows if not hasattr(torch, DTYPE_NAMES.get(dtype, ""))]:
        raise WeightsError(f"{path}: dtype {unknown[0]} is not known; give one of {', '.join(DTYPE_NAMES)}")
    if not rows:
        raise WeightsError(f"{path} holds no tensor; give a checkpoint")
    tensors = {name: (DTYPE_NAMES[dtype], _stored_shape(dtype, shape)) for name, dtype, shape, _ in rows}
    starts = {name: offsets[0] for name, _, _, offsets in rows}
    size = max(offsets[1] for *_, offsets in rows)
    ties = _ties_in_metadata(metadata, tensors)
    doubles = [(name, starts[name], starts[owner]) for name, owner in ties.items() if name in starts]
    tensors |= {name: tensors[owner] for name, owner in ties.items()}
    starts |= {name: starts[owner] for name, owner in ties.items()}
    plan = _copy_plan(tensors, [("", starts[name]) for name in tensors], {"": size}, path, ties)
    num_bytes = {name: math.prod(shape) * getattr(torch, dtype).itemsize for name, (dtype, shape) in tensors.items()}
    sized = tuple((*double, num_bytes[double[0]]) for double in doubles)
    return replace(plan, doubles=sized, metadata=metadata)


def _stored_shape(dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape in torch, which counts a byte with two 4-bit values as one element."""
    return (*shape[:-1], shape[-1] // 2) if dtype == "F4" and shape else shape


def _ties_in_metadata(metadata: Mapping[str, str], tensors: Mapping[str, object]) -> dict[str, str]:
    """Reads ties from metadata as safetensors' `save_model` writes them: the name of a tensor -> that of its owner.

    The tied tensor may be stored in the file too.
    """
    return {
        name: owner
        for name, owner in metadata.items()
        if owner in tensors
        and name != owner
        and owner not in metadata
        and (tensors[name] == tensors[owner] if name in tensors else "." in name)
    }


def archive_plan(state: Mapping[str, TensorReference], source: str) -> CopyPlan:
    """Plans the copies of a torch file from references to its contiguous tensors.

    Raises:
        NotPlainError: A storage has two dtypes.
        WeightsError: A tensor is larger than any can be.
    """
    tensors = {name: (reference.storage.dtype, reference.shape) for name, reference in state.items()}
    sources = [(reference.storage.key, reference.byte_range[0]) for reference in state.values()]
    storages = {reference.storage.key: reference.storage for reference in state.values()}
    if any(storages[reference.storage.key] != reference.storage for reference in state.values()):
        raise NotPlainError("a storage of two kinds")
    first: dict[TensorReference, str] = {}
    owners = {name: first.setdefault(reference, name) for name, reference in state.items() if reference.byte_range[1]}
    ties = {name: owner for name, owner in owners.items() if name != owner}
    entries = {key: storage.num_bytes for key, storage in storages.items()}
    return _copy_plan(tensors, sources, entries, source, ties)


def _copy_plan(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    sources: list[tuple[str, int]],
    entries: dict[str, int],
    file: str,
    ties: Mapping[str, str],
) -> CopyPlan:
    # A length of 0 counts as 1, because it would hide any other length.
    if huge := [name for name, (_, shape) in tensors.items() if math.prod(max(length, 1) for length in shape) >= 2**63]:
        raise WeightsError(f"{file}: tensor '{huge[0]}' is larger than any tensor can be; fetch it again")
    prefix, names = split_prefix(list(tensors))
    shapes = {name: shape for name, (_, shape) in zip(names, tensors.values(), strict=True)}
    specs = tuple(
        TensorSpec(
            name=name,
            shape=shape,
            dtype=dtype,
            kind=kind_of(name, getattr(torch, dtype), shapes),
            tied_to=ties[full].removeprefix(prefix) if full in ties else "",
        )
        for name, (full, (dtype, shape)) in zip(names, tensors.items(), strict=True)
    )
    layout = Layout(specs)
    return CopyPlan(layout, prefix, _copies(layout, sources, entries), entries)


def _copies(layout: Layout, sources: Sequence[tuple[str, int]], entries: Mapping[str, int]) -> tuple[CopyRange, ...]:
    """Plans the copies for a layout whose tensors begin at these offsets of entries; neighbours are copied together."""
    copies: list[CopyRange] = []
    for (entry, source), target, spec in zip(sources, layout.byte_offsets, layout.tensors, strict=False):
        if not spec.num_bytes:
            continue
        last = copies[-1] if copies else None
        adjoins = last is not None and (last.entry, last.source + last.num_bytes) == (entry, source)
        if last is not None and adjoins and last.target + last.num_bytes == target:
            copies[-1] = CopyRange(entry, last.source, last.target, last.num_bytes + spec.num_bytes)
        else:
            copies.append(CopyRange(entry, source, target, spec.num_bytes))
    wanted = Counter(copy.entry for copy in copies)
    return tuple(
        replace(copy, is_whole=wanted[copy.entry] == 1 and copy.num_bytes == entries[copy.entry]) for copy in copies
    )
