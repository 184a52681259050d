"""Finds the networks in saved objects: training states, wrappers, lists of networks, prefixed names."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raywgen.weights.errors import NotWeightsError, UnsafeFileError, WeightsError
from raywgen.weights.inert_pickle import Opaque
from raywgen.weights.names import PREFIXES

_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "network", "net", "weights", "params")
_MAX_DEPTH = 8
_MAX_PLACES = 100_000
# Trainers save these entries in the same file; they hold tensors, but no network.
_NO_NETWORK = re.compile(r"optim|sched|scaler|rng|random|hyper_?param|hparam|config|^args$|callback|loops|metric", re.I)
_OPTIMIZER_TENSORS = {
    *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg", "acc_delta", "exp_inf"),
    *("exp_avg_sq_row", "exp_avg_sq_col", "sum", "step", "step_size", "prev", "fp32_flat_groups", "fp32_groups"),
}
_REMEDY = "save module.state_dict() alone"


@dataclass(frozen=True, slots=True)
class Network:
    """A mapping from names to tensors, the keys that lead to it, and the top level of the file."""

    path: tuple[str, ...]
    state: dict[str, Any]
    beside: Mapping[Any, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The key by which `--select` chooses the network."""
        return ".".join(self.path)


@dataclass(frozen=True, slots=True)
class Choice:
    """The selected networks of a file, each with its key if there are several, and the keys of the others."""

    networks: tuple[tuple[str | None, Network], ...]
    others: tuple[str, ...] = ()


def choose_networks(content: Any, leaf: type | tuple[type, ...], source: str, select: Sequence[str] = ()) -> Choice:
    """Selects the wanted networks from the content of a file.

    A single network is taken wherever it lies. Of several, the one under a name that trainers use is taken, or those
    whose keys match `select`.

    Args:
        content: The loaded object.
        leaf: The class that represents a tensor.
        source: The file, for the message.
        select: Keys or patterns, used if there are several networks.

    Raises:
        NotWeightsError: The file holds something else, such as an optimizer's state.
        WeightsError: There is no network, or there are several and none is selected.
    """
    search = _NetworkSearch(leaf, content if isinstance(content, Mapping) else {})
    search.look(content, ())
    found = search.networks
    if not found:
        raise search.error(content, source)
    if len(found) == 1:
        return Choice(((None, found[0]),))
    if select:
        wanted = [n for n in found if any(fnmatch.fnmatchcase(n.key, pattern) for pattern in select)]
        if wanted:
            return Choice(tuple((n.key if len(wanted) > 1 else None, n) for n in wanted))
    else:
        usual = [network for network in found if all(key in _WRAPPERS for key in network.path)]
        if len(usual) == 1:
            others = tuple(network.key for network in found if network is not usual[0])
            return Choice(((None, usual[0]),), others)
    keys = [f"'{network.key}'" for network in found]
    listed = ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
    raise WeightsError(
        f"{source} holds {len(found)} networks: {listed}; choose by `--select KEY` (a key, a pattern, or '*' for each)"
    )


class _NetworkSearch:
    """Searches nested mappings and lists for networks, and remembers what explains that there is none."""

    def __init__(self, leaf: type | tuple[type, ...], top: Mapping[Any, Any]) -> None:
        self.networks: list[Network] = []
        self.has_floats = False
        self.has_optimizer_state = False
        self._leaf = leaf
        self._top = top
        self._places = 0
        self._mixed = ""
        self._objects: list[tuple[str, str]] = []

    def look(self, place: Any, path: tuple[str, ...]) -> None:
        self._places += 1
        if isinstance(place, Opaque):
            if not place.entries:
                self._objects.append((".".join(path), place.name))
            place = place.entries
        if isinstance(place, list | tuple):
            place = dict(enumerate(place))
        if not isinstance(place, Mapping) or not place or len(path) > _MAX_DEPTH or self._places > _MAX_PLACES:
            self.has_floats |= isinstance(place, self._leaf) and _is_floating(place)
            return
        # Indexed rather than by `items()`, which a pickle may replace on an OrderedDict.
        tensors = {name: place[name] for name in place if isinstance(place[name], self._leaf)}
        rest = {name: place[name] for name in place if name not in tensors}
        self.has_floats |= any(map(_is_floating, tensors.values()))
        if "param_groups" in rest or (tensors and {str(name) for name in tensors} <= _OPTIMIZER_TENSORS):
            self.has_optimizer_state = True
        elif tensors and self._is_network(tensors, rest, path):
            self.networks.append(Network(path, tensors, self._top))
        else:
            self._look_into(rest, path, beside_tensors=len(tensors) > 1)

    def _is_network(self, tensors: dict[Any, Any], rest: dict[Any, Any], path: tuple[str, ...]) -> bool:
        if not all(isinstance(name, str) for name in tensors):
            return False
        # Numbers and texts among the tensors (`epoch`) are dropped; anything else may be weights in another form.
        if any(value is not None and not isinstance(value, int | float | str) for value in rest.values()):
            return False
        if (not rest and not path) or (not rest and all(key in _WRAPPERS for key in path)):
            return True
        floating = [tensor for tensor in tensors.values() if _is_floating(tensor)]
        return any(_is_matrix(tensor) for tensor in floating) or (bool(floating) and not rest and len(tensors) > 1)

    def _look_into(self, rest: dict[Any, Any], path: tuple[str, ...], *, beside_tensors: bool) -> None:
        before = len(self.networks)
        for name, value in rest.items():
            if isinstance(name, str) and _NO_NETWORK.search(name):
                self.has_optimizer_state |= "optim" in name.lower()
            else:
                self.look(value, (*path, str(name)))
        if beside_tensors and len(self.networks) == before and rest and not self._mixed:
            name, value = next(
                (n, v) for n, v in rest.items() if v is not None and not isinstance(v, int | float | str)
            )
            what = f"an object of class {value.name}" if isinstance(value, Opaque) else f"a {type(value).__name__}"
            self._mixed = f"entry '{'.'.join((*path, str(name)))}' among its tensors is {what}"

    def error(self, content: Any, source: str) -> WeightsError:
        """Returns the error that explains why there is no network."""
        if self.has_optimizer_state:
            return NotWeightsError(f"{source} holds no state_dict (it is an optimizer's state); {_REMEDY}")
        if self._mixed and self.has_floats:
            return WeightsError(f"{source} holds no state_dict ({self._mixed}); {_REMEDY}")
        if self._objects and not self.has_floats:
            key, name = self._objects[0]
            where = f"under '{key}' " if key else ""
            return UnsafeFileError(
                f"{source} holds pickled code or objects ({where}an object of class {name}), which are never executed; "
                "save the state_dict alone, best as .safetensors"
            )
        message = f"{source} holds no state_dict ({_description(content)}); {_REMEDY}"
        return WeightsError(message) if self.has_floats else NotWeightsError(message)


def _description(content: Any) -> str:
    shape = getattr(content, "shape", None)
    if shape is not None:
        return f"it is one tensor {list(shape)}"
    if isinstance(content, list | tuple):
        return f"it is a list of {len(content)}"
    if isinstance(content, Mapping):
        keys = ", ".join(f"'{key}'" for key in list(content)[:6])
        return f"it has the keys {keys}, none of which leads to a network" if keys else "it is empty"
    return f"it is a {type(content).__name__}"


def _is_floating(tensor: Any) -> bool:
    dtype = getattr(tensor, "dtype", None)
    return dtype is None or dtype.is_floating_point


def _is_matrix(tensor: Any) -> bool:
    # A nested tensor has no shape.
    return getattr(tensor, "is_nested", False) or len(tensor.shape) >= 2


def split_prefix(names: list[str]) -> tuple[str, list[str]]:
    """Splits off the prefix that a wrapper (DataParallel, torch.compile) put before every name."""
    taken = ""
    while found := next((p for p in PREFIXES if names and all(n.startswith(p) and n != p for n in names)), None):
        taken += found
        names = [name.removeprefix(found) for name in names]
    return taken, names
