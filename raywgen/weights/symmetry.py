"""Finds the hidden units of a network that may be exchanged without changing its function.

The module is traced once, without values, to a graph of ATen operations, through which
`raywgen.weights.permutation_axes` follows its units. So residual sums, batch norm and flattening need nothing from the
module's author. A unit that reaches an operation through which it cannot be followed (attention heads, grouped
convolutions, an operation without a rule) stays in place.

Shape letters beyond the legend in `raywgen.weights`: U units of a group, M places that a unit takes on an axis.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from raywgen.weights.errors import WeightsError
from raywgen.weights.permutation_axes import Axis, HiddenUnits, places_of
from raywgen.weights.permutation_rules import RULES, Axes, freeze_all, pointwise
from raywgen.weights.tensors import StateDict

# Rounding of float32 through a hundred layers stays below this; the error of a misplaced unit does not.
_TOLERANCE = 1e-4
_LEAST = 1e-30


class SymmetryError(WeightsError):
    """A module whose hidden units cannot be followed."""


@dataclass(frozen=True, slots=True)
class UnitPlace:
    """The axis of a tensor on which the units of a group lie, and their positions on it, int64 `(U, M)`."""

    tensor: str
    axis: int
    index_UM: Tensor


@dataclass(frozen=True, slots=True)
class UnitGroup:
    """Units that may be exchanged with one another.

    Attributes:
        num_units: Number of units, U.
        places: Every axis that must be reordered together with them.
    """

    num_units: int
    places: tuple[UnitPlace, ...]


@dataclass(frozen=True, slots=True)
class Symmetry:
    """All exchanges of hidden units that do not change a network's function.

    Attributes:
        groups: Groups of units, from the first layer to the last.
        blocked_by: Operations without a rule, whose inputs and outputs keep their order.
    """

    groups: tuple[UnitGroup, ...]
    blocked_by: tuple[str, ...]

    def permute(self, state: Mapping[str, Tensor], permutations: Sequence[Tensor]) -> StateDict:
        """Reorders the units of a network, which keeps its function; tensors without such units are not copied.

        Args:
            state: Tensors of one network.
            permutations: For each group, the unit that moves to each place, int64 `(U,)`.
        """
        permuted = dict(state)
        for group, order_U in zip(self.groups, permutations, strict=True):
            if torch.equal(order_U, torch.arange(group.num_units)):
                continue
            for place in group.places:
                tensor = permuted[place.tensor]
                index = torch.arange(tensor.shape[place.axis])
                index[place.index_UM] = place.index_UM[order_U]
                permuted[place.tensor] = tensor.index_select(place.axis, index.to(tensor.device))
        return permuted


def find_symmetry(module: nn.Module, *inputs: Tensor) -> Symmetry:
    """Follows the hidden units of any module, in eval mode.

    Args:
        module: The module; it is not changed.
        inputs: Arguments of its `forward`; only shapes and dtypes count, and the batch may be of any size.

    Raises:
        SymmetryError: The module cannot be traced, for instance because its control flow depends on values.
    """
    names = _names_by_tensor(module)
    graph, leaves = _traced(module, [known[0] for known in names], inputs)
    units = HiddenUnits()
    blocked = _follow(graph, units, leaves)
    groups = _groups(units, leaves, {known[0]: known for known in names})
    return Symmetry(tuple(groups), tuple(dict.fromkeys(blocked)))


@torch.no_grad()
def check_symmetry(module: nn.Module, symmetry: Symmetry, *inputs: Tensor) -> float:
    """Reorders all units at random and compares the outputs of the module.

    Returns:
        The largest difference of an output, divided by the largest output.

    Raises:
        SymmetryError: The difference is larger than rounding explains.
    """
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(group.num_units, generator=generator) for group in symmetry.groups]
    state = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    before, after = (_outputs(module, weights, inputs) for weights in (state, symmetry.permute(state, orders)))
    scale = max((float(tensor.abs().max()) for tensor in before), default=0.0)
    change = max((float((a - b).abs().max()) for a, b in zip(before, after, strict=True)), default=0.0)
    if not change <= _TOLERANCE * max(scale, _LEAST):
        raise SymmetryError(
            f"reordering the hidden units of {type(module).__name__} changes its outputs by {change:.3g} of "
            f"{scale:.3g}: it uses an operation that raywgen follows wrongly; leave it unaligned and report it"
        )
    return change / max(scale, _LEAST)


def _outputs(module: nn.Module, state: StateDict, inputs: Sequence[Tensor]) -> list[Tensor]:
    was_training = module.training
    try:
        given = functional_call(module.eval(), state, tuple(inputs))
    finally:
        module.train(was_training)
    return [value for value in tree_leaves(given) if isinstance(value, Tensor)]


def _names_by_tensor(module: nn.Module) -> list[list[str]]:
    """Groups the names of the `state_dict` by tensor: tied names stand together."""
    names: dict[int, list[str]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    return list(names.values())


def _traced(
    module: nn.Module, names: Sequence[str], inputs: Sequence[Tensor]
) -> tuple[torch.fx.Graph, dict[str, Axes]]:
    """Returns the graph, with placeholders in the order of names, and the axes of each name, without labels yet."""
    every = module.state_dict()
    state = {name: every[name].detach() for name in names}
    device = next(iter(state.values())).device if state else torch.device("cpu")

    def run(tensors: list[Tensor], given: tuple[Tensor, ...]) -> list[Tensor]:
        return _outputs(module, dict(zip(names, tensors, strict=True)), given)

    try:
        with torch.no_grad():
            # Fake tensors have shapes but no values: nothing is computed, however large the network.
            make = make_fx(functionalize(run), tracing_mode="fake", _allow_non_fake_inputs=True)
            traced = make(list(state.values()), tuple(value.to(device) for value in inputs))
    except Exception as error:  # whatever a user's forward raises
        shapes = ", ".join(str(tuple(value.shape)) for value in inputs)
        reason = str(error).partition("\n")[0]
        raise SymmetryError(
            f"{type(module).__name__} cannot be traced with inputs of shape {shapes} ({reason}); give inputs that its "
            "forward takes, and let its control flow depend on shapes alone"
        ) from error
    return traced.graph, {name: tuple(map(Axis, tensor.shape)) for name, tensor in state.items()}


def _follow(graph: torch.fx.Graph, units: HiddenUnits, leaves: Mapping[str, Axes]) -> list[str]:
    """Carries units through all operations; returns the operations without a rule that stopped a unit."""
    known: dict[torch.fx.Node, Any] = {}
    blocked: list[str] = []
    weights = iter(leaves.values())
    for node in graph.nodes:
        if node.op == "placeholder":
            known[node] = next(weights, None) or freeze_all(units, _shape(node))
        elif node.op == "get_attr":
            known[node] = freeze_all(units, tuple(getattr(_attribute(graph, node.target), "shape", ())))
        elif node.op == "output":
            freeze_all(units, (), *torch.fx.map_arg(node.args, lambda value: known[value]))
        elif node.target is operator.getitem:
            known[node] = known[node.args[0]][node.args[1]]
        else:
            known[node] = _apply(node, units, known, blocked)
    return blocked


def _apply(node: torch.fx.Node, units: HiddenUnits, known: Mapping[torch.fx.Node, Any], blocked: list[str]) -> Any:
    args, named = torch.fx.map_arg((node.args, node.kwargs), lambda value: known[value])
    operation: Any = node.target
    name = operation.overloadpacket.__name__
    rule = RULES.get(name) or (pointwise if torch.Tag.pointwise in operation.tags else None)
    if rule is None:
        rule = freeze_all
        if any(not axis.is_fixed for value in node.all_input_nodes for axis in _flat(known[value])):
            blocked.append(name)
    axes = rule(units, _shape(node), *args, **named)
    value = node.meta["val"]
    is_several = isinstance(value, list | tuple)
    if is_several and rule is freeze_all:
        return tuple(freeze_all(units, tuple(getattr(one, "shape", ()))) for one in value)
    is_one = all(isinstance(axis, Axis) for axis in axes)
    return (axes,) * len(value) if is_several and is_one else axes


def _flat(axes: Any) -> list[Axis]:
    return [axes] if isinstance(axes, Axis) else [axis for one in axes for axis in _flat(one)]


def _shape(node: torch.fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    first = value[0] if isinstance(value, list | tuple) and value else value
    return tuple(getattr(first, "shape", ()))


def _attribute(graph: torch.fx.Graph, name: str) -> Any:
    return operator.attrgetter(name)(graph.owning_module)


Seat = tuple[str, int, int, tuple]
"""Tensor, axis, factor of the axis, and the key of the unit that a set of tied units has there."""


def _groups(units: HiddenUnits, leaves: Mapping[str, Axes], names: Mapping[str, list[str]]) -> list[UnitGroup]:
    """Groups the sets of tied units that no operation distinguishes."""
    labels_of = {(name, dim): units.labels(axis) for name, axes in leaves.items() for dim, axis in enumerate(axes)}
    members = units.members()
    seats: dict[int, dict[Seat, int]] = {root: {} for root in members}
    shared: set[int] = set()
    for (name, dim), factors in labels_of.items():
        for factor, labels in enumerate(factors):
            for place, unit in enumerate(labels.tolist()):
                if unit < 0 or (root := units.find(unit)) not in members:
                    continue
                seat = (name, dim, factor, units.key(unit))
                # Two units of a set are indistinguishable, so their order would be a guess.
                if seat in seats[root]:
                    shared.add(root)
                seats[root][seat] = place
    alike: dict[Any, list[int]] = {}
    for root, tied in members.items():
        keys = sorted(units.key(unit) for unit in tied)
        if root not in shared and len(set(keys)) == len(keys) and seats[root]:
            alike.setdefault((tuple(keys), tuple(sorted(seats[root]))), []).append(root)
    order = {name: index for index, name in enumerate(leaves)}
    groups = [roots for roots in alike.values() if len(roots) > 1]
    groups.sort(key=lambda roots: min(order[seat[0]] for seat in seats[roots[0]]))
    return [_group([seats[root] for root in roots], labels_of, names) for roots in groups]


def _group(
    seats: list[dict[Seat, int]],
    labels_of: Mapping[tuple[str, int], Sequence[np.ndarray]],
    names: Mapping[str, list[str]],
) -> UnitGroup:
    columns: dict[tuple[str, int], list[np.ndarray]] = {}
    for name, dim, factor, key in sorted(seats[0]):
        rows = [places_of(labels_of[name, dim], factor, one[name, dim, factor, key]) for one in seats]
        columns.setdefault((name, dim), []).append(np.stack(rows))
    return UnitGroup(
        len(seats),
        tuple(
            UnitPlace(alias, dim, torch.from_numpy(np.concatenate(parts, axis=1)))
            for (name, dim), parts in columns.items()
            for alias in names[name]
        ),
    )
