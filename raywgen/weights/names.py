"""Removes what wrappers add to the names of tensors.

`DataParallel` and `DistributedDataParallel` put `module.` before a name, `torch.compile` `_orig_mod.`, FSDP and
activation checkpointing their own segments, wherever the wrapped part lies; Lightning keeps the network as `model`.
None of them changes the network, so two networks are of one architecture if their names agree without them.
"""

from __future__ import annotations

from collections.abc import Sequence

PREFIXES = ("module.", "_orig_mod.", "_forward_module.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""Prefixes that a wrapper around the whole network puts before every name."""
# No network uses these names itself.
_SEGMENTS = frozenset(
    {"_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "_module"}
)
# A network may use these names itself, so they are removed only to compare names.
_WRAPPED = "module"
_LIGHTNING = "model."


def without_wrappers(names: Sequence[str]) -> list[str]:
    """Removes the segments that only wrappers use; returns names unchanged if two would become equal."""
    return _distinct([_without(name, _SEGMENTS) for name in names], names)


def plain_names(names: Sequence[str]) -> list[str]:
    """Returns names for comparing networks: all wrappers are removed, even where a network may use the name itself."""
    names = without_wrappers(names)
    names = _distinct([_without(name, {_WRAPPED}) for name in names], names)
    while names and all(name.startswith(_LIGHTNING) and name != _LIGHTNING for name in names):
        names = [name.removeprefix(_LIGHTNING) for name in names]
    return list(names)


def _without(name: str, segments: set[str] | frozenset[str]) -> str:
    *parts, leaf = name.split(".")
    return ".".join([*(part for part in parts if part not in segments), leaf])


def _distinct(names: list[str], before: Sequence[str]) -> list[str]:
    return names if len(set(names)) == len(names) else list(before)
