"""Finds the `state_dict` in what people save: training states, wrappers, prefixes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raywgen.weights.errors import WeightsError
from raywgen.weights.names import PREFIXES

_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "network", "net", "weights", "params")


def find_state_dict(content: Any, leaf: type, source: str) -> dict[str, Any]:
    """The mapping from names to tensors in what a file holds.

    Args:
        content: What was loaded.
        leaf: What stands for a tensor.
        source: The file, for the message.

    Raises:
        WeightsError: There is none, or an entry of it is no tensor.
    """
    place = content
    for _ in range(3):
        if not isinstance(place, Mapping):
            break
        # By item, not by method: a pickle may hang an `items` of its own on an OrderedDict.
        if place and all(isinstance(name, str) and isinstance(place[name], leaf) for name in place):
            return {name: place[name] for name in place}
        inner = next((place[name] for name in _WRAPPERS if name in place and isinstance(place[name], Mapping)), None)
        if inner is None:
            break
        place = inner
    raise WeightsError(
        f"{source} holds no state_dict (looked at the top and under {', '.join(_WRAPPERS[:4])}, ...); "
        "save module.state_dict() alone"
    )


def split_prefix(names: list[str]) -> tuple[str, list[str]]:
    """The prefix that a wrapper (DataParallel, torch.compile) put before every name, and the names without it."""
    taken = ""
    while found := next((p for p in PREFIXES if names and all(n.startswith(p) and n != p for n in names)), None):
        taken += found
        names = [name.removeprefix(found) for name in names]
    return taken, names
