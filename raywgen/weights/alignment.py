"""Weight matching finds the order of hidden units in which networks lie closest to a reference.

Source: Ainsworth et al., "Git Re-Basin: Merging Models modulo Permutation Symmetries", ICLR 2023 (arXiv 2209.04836),
section 3.2, algorithm 1. It maximises the inner product of all parameters with those of the reference, which minimises
their distance, by solving one linear assignment after another until none gains.

raywgen departs from the paper as follows. The descent starts twice, from the given order of the networks and from an
order that is matched layer by layer from the input (each group of units by the axes whose neighbours are matched
already), and the better result is kept. So a network never ends farther from the reference than it began, and a
reordered copy of the reference is matched exactly. An assignment is accepted only if it gains over all tensors that it
touches, because the linear problem is an approximation if both axes of a tensor belong to one group. Running statistics
move along with their units but do not count.

Shape letters beyond the legend in `raywgen.weights`: U units of a group, M places that a unit takes on an axis. Here K
is the number of values of a unit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raywgen.weights.layout import Layout
from raywgen.weights.symmetry import Symmetry, UnitGroup, UnitPlace
from raywgen.weights.tensors import StateDict

_SILENT = ("running_mean", "running_var", "counter")
_GAIN = 1e-6
_LEAST = 1e-300


@dataclass(frozen=True, slots=True, kw_only=True)
class MatchedOrders:
    """The orders that bring networks closest to a reference.

    Attributes:
        orders: For each group of the symmetry, the unit that moves to each place, int64 `(N, U)`.
        distance_N: Distance to the reference before reordering, divided by the norm of the reference, without running
            statistics.
        matched_N: The same distance after reordering; never above `distance_N`, except for rounding.
    """

    orders: list[Tensor]
    distance_N: Tensor
    matched_N: Tensor

    def of(self, index: int) -> list[Tensor]:
        """Returns the permutations of one network, as `Symmetry.permute` takes them."""
        return [order_NU[index] for order_NU in self.orders]


def match_weights(
    symmetry: Symmetry, reference: Mapping[str, Tensor], states: StateDict, seed: int = 0
) -> MatchedOrders:
    """Matches many networks at once with one reference.

    Args:
        symmetry: Symmetry of their architecture.
        reference: Tensors of the reference.
        states: Tensors of the networks, each with a first dimension N.
        seed: Seed of the order in which groups are visited.
    """
    voiced = [spec.name for spec in Layout.from_state_dict(reference).tensors if spec.kind not in _SILENT]
    reference = {name: reference[name].detach().float() for name in voiced}
    states = {name: states[name].detach().float() for name in voiced}
    ends = []
    for is_settled_first in (False, True):
        search = _Matching(symmetry, reference, states)
        if is_settled_first:
            search.settle()
        search.descend(seed)
        ends.append(search)
    kept, other = ends
    better_N = other.product() > kept.product() + _GAIN * _square(reference)
    orders = [torch.where(better_N[:, None], b, a) for a, b in zip(kept.orders, other.orders, strict=True)]
    apart = [torch.where(better_N, other.distance(), kept.distance()), _distance(reference, states)]
    return MatchedOrders(orders=orders, matched_N=apart[0], distance_N=apart[1])


class _Matching:
    """Networks that are being reordered, and the orders found so far."""

    def __init__(self, symmetry: Symmetry, reference: StateDict, states: StateDict) -> None:
        self._groups = [
            UnitGroup(group.num_units, tuple(place for place in group.places if place.tensor in reference))
            for group in symmetry.groups
        ]
        self._reference = reference
        self._states = dict(states)
        self._num = len(next(iter(states.values())))
        self.orders = [torch.arange(group.num_units).repeat(self._num, 1) for group in self._groups]

    def settle(self) -> None:
        """Matches each group once, even without gain; next comes the group with the largest matched share of values."""
        remaining = list(range(len(self._groups)))
        while remaining:
            settled = {index: self._settled(index, remaining) for index in remaining}
            index = max(remaining, key=lambda index: self._share(index, settled[index]))
            order_NU = self._assign(settled[index] or self._groups[index].places)
            self._take(index, order_NU, torch.ones(self._num, dtype=torch.bool))
            remaining.remove(index)

    def descend(self, seed: int) -> None:
        """Runs algorithm 1: matches groups in random order until no assignment gains in any network."""
        generator = torch.Generator().manual_seed(seed)
        gained = True
        while gained:
            gained = False
            for index in torch.randperm(len(self._groups), generator=generator).tolist():
                gained |= self._improve(index)

    def product(self) -> Tensor:
        """Returns the inner product of each network with the reference, `(N,)`."""
        return _product(self._reference, self._states)

    def distance(self) -> Tensor:
        """Returns the distance of each network to the reference, as `MatchedOrders` defines it."""
        return _distance(self._reference, self._states)

    def _improve(self, index: int) -> bool:
        group = self._groups[index]
        order_NU = self._assign(group.places)
        if bool((order_NU == torch.arange(group.num_units)).all()):
            return False
        touched = {place.tensor: self._reference[place.tensor] for place in group.places}
        before_N = _product(touched, self._states)
        after_N = _product(touched, _reordered(self._states, group, order_NU))
        better_N = after_N > before_N + _GAIN * _square(touched)
        self._take(index, order_NU, better_N)
        return bool(better_N.any())

    def _take(self, index: int, order_NU: Tensor, taken_N: Tensor) -> None:
        order_NU = torch.where(taken_N[:, None], order_NU, torch.arange(order_NU.shape[1]))
        self._states |= _reordered(self._states, self._groups[index], order_NU)
        self.orders[index] = self.orders[index].gather(1, order_NU)

    def _assign(self, places: Sequence[UnitPlace]) -> Tensor:
        """Solves the linear assignment that maximises the similarity of units, `(N, U)`."""
        from scipy.optimize import linear_sum_assignment  # Late, as in `raywgen.tasks.digits`.

        num_units = len(places[0].index_UM)
        similar_NUU = torch.zeros(self._num, num_units, num_units, dtype=torch.float64)
        for place in places:
            wanted_UK = _rows(self._reference[place.tensor].unsqueeze(0), place)[0]
            similar_NUU += wanted_UK @ _rows(self._states[place.tensor], place).transpose(1, 2)
        return torch.stack(
            [torch.from_numpy(linear_sum_assignment(one.numpy(), maximize=True)[1]) for one in similar_NUU]
        )

    def _settled(self, index: int, remaining: Sequence[int]) -> list[UnitPlace]:
        """Returns the axes of a group whose tensors have no other axis that is still to be matched."""
        waiting = [(place.tensor, place.axis) for other in remaining for place in self._groups[other].places]
        return [
            place for place in self._groups[index].places if sum(tensor == place.tensor for tensor, _ in waiting) == 1
        ]

    def _share(self, index: int, settled: Sequence[UnitPlace]) -> float:
        values = [
            sum(self._reference[place.tensor].numel() for place in places)
            for places in (settled, self._groups[index].places)
        ]
        return values[0] / values[1]


def _rows(states: Tensor, place: UnitPlace) -> Tensor:
    """Collects the values of each unit on one axis, `(N, U, K)`."""
    moved = states.movedim(place.axis + 1, 1)[:, place.index_UM]
    return moved.reshape(len(states), len(place.index_UM), -1)


def _reordered(states: StateDict, group: UnitGroup, order_NU: Tensor) -> StateDict:
    """Reorders the units of a group in all its tensors, with an order of its own for each network."""
    found: StateDict = {}
    for place in group.places:
        tensor = found.get(place.tensor, states[place.tensor])
        index_NX = torch.arange(tensor.shape[place.axis + 1]).repeat(len(tensor), 1)
        index_NX[:, place.index_UM] = place.index_UM[order_NU]
        rows = [one.index_select(place.axis, index_X) for one, index_X in zip(tensor, index_NX, strict=True)]
        found[place.tensor] = torch.stack(rows)
    return found


def _product(reference: Mapping[str, Tensor], states: Mapping[str, Tensor]) -> Tensor:
    parts = [(states[name] * one).flatten(1).sum(1, dtype=torch.float64) for name, one in reference.items()]
    return torch.stack(parts).sum(0)


def _square(reference: Mapping[str, Tensor]) -> float:
    return sum(float(one.square().sum(dtype=torch.float64)) for one in reference.values())


def _distance(reference: Mapping[str, Tensor], states: Mapping[str, Tensor]) -> Tensor:
    parts = [(states[name] - one).square().flatten(1).sum(1, dtype=torch.float64) for name, one in reference.items()]
    return (torch.stack(parts).sum(0) / max(_square(reference), _LEAST)).sqrt()
