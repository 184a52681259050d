"""Labels for the hidden units along the axes of tensors, which record the units that move together.

An axis is a product of factors, the slowest first, as after flattening: channels, height, width. A factor is an
array of labels: the number of a unit, `FIXED` where the position has a meaning of its own (a pixel, a class), or a
number below `FIXED` where all positions with that label hold one constant (the zeros that padding adds).

Two units that are added, or that meet in a contraction, are tied: they move together. An operation that treats the
units of an axis differently marks those it takes. In the end two sets of tied units may be exchanged if their units
were created on the same axes, have the same marks and lie on the same axes: then no operation distinguishes them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

FIXED = -1
Key = tuple[int, tuple[int, ...]]
"""Number of the axis on which a unit was created, and its marks."""


class Axis:
    """One axis of a tensor, shared by all tensors that have it.

    Attributes:
        size: Number of positions along it.
    """

    def __init__(self, size: int, factors: tuple[np.ndarray, ...] | None = None) -> None:
        self.size = size
        self._factors = () if size == 1 else factors
        self._same: Axis | None = None

    def root(self) -> Axis:
        """Returns the axis that this one turned out to be."""
        return self if self._same is None else self._same.root()

    @property
    def factors(self) -> tuple[np.ndarray, ...] | None:
        """Labels of the axis; None while only its size is known."""
        return self.root()._factors

    @property
    def is_fixed(self) -> bool:
        """Whether no position of the axis holds a unit."""
        return self.factors is not None and all((labels == FIXED).all() for labels in self.factors)

    def become(self, other: Axis) -> None:
        """Identifies this axis, whose labels are unknown, with another one."""
        if self.root() is not other.root():
            self.root()._same = other.root()

    def label(self, factors: tuple[np.ndarray, ...]) -> None:
        """Sets the labels of an axis whose labels were unknown."""
        self.root()._factors = factors


def fixed(size: int) -> Axis:
    """Creates an axis whose positions have a meaning of their own."""
    return Axis(size, (np.full(size, FIXED),))


class HiddenUnits:
    """The hidden units of a network, with their ties and marks."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._birth: list[int] = []
        self._marks: list[set[int]] = []
        self._frozen: set[int] = set()
        self._num_births = 0
        self._num_marks = 0
        self._constants: dict[tuple[int, int], int] = {}
        self._last_constant = FIXED

    def born(self, size: int) -> np.ndarray:
        """Creates units on one axis and returns their labels."""
        first = len(self._parent)
        self._parent += range(first, first + size)
        self._birth += [self._num_births] * size
        self._marks += [set() for _ in range(size)]
        self._num_births += 1
        return np.arange(first, first + size)

    def all_equal(self, size: int) -> Axis:
        """Creates an axis along which all values are equal."""
        return Axis(size, (np.full(size, self._constant()),))

    def _constant(self) -> int:
        self._last_constant -= 1
        return self._last_constant

    def find(self, unit: int) -> int:
        """Returns the unit that represents all units tied to this one."""
        while self._parent[unit] != unit:
            self._parent[unit] = self._parent[self._parent[unit]]
            unit = self._parent[unit]
        return unit

    def members(self) -> dict[int, list[int]]:
        """Returns the sets of tied units that may move, by the unit that represents them."""
        frozen = {self.find(unit) for unit in self._frozen}
        found: dict[int, list[int]] = {}
        for unit in range(len(self._parent)):
            if (root := self.find(unit)) not in frozen:
                found.setdefault(root, []).append(unit)
        return found

    def key(self, unit: int) -> Key:
        """Returns the key that distinguishes a unit from the others tied to it."""
        return self._birth[unit], tuple(sorted(self._marks[unit]))

    def labels(self, axis: Axis) -> tuple[np.ndarray, ...]:
        """Returns the factors of an axis; creates units along it if its labels are unknown."""
        if axis.factors is None:
            axis.label((self.born(axis.size),))
        assert axis.factors is not None
        return axis.factors

    def freeze(self, axis: Axis) -> Axis:
        """Fixes the units along an axis in place."""
        if axis.factors is None:
            axis.label((np.full(axis.size, FIXED),))
        for labels in axis.factors or ():
            self._frozen.update(labels[labels >= 0].tolist())
        return fixed(axis.size)

    def same(self, one: Axis, other: Axis) -> Axis:
        """Ties the units of two axes of one size, position by position."""
        if one.root() is other.root():
            return one
        if one.factors is None or other.factors is None:
            unknown, known = (one, other) if one.factors is None else (other, one)
            if known.factors is None:
                unknown.become(known)
                return known
            # A constant may differ from position to position once it is combined with a tensor of the network.
            unknown.label(tuple(self._filled(labels) for labels in known.factors))
        mine, others = self.labels(one), self.labels(other)
        if [len(labels) for labels in mine] != [len(labels) for labels in others]:
            self.freeze(one)
            return self.freeze(other)
        return Axis(one.size, tuple(self._tie(a, b) for a, b in zip(mine, others, strict=True)))

    def cut(self, axis: Axis, places: slice) -> Axis:
        """Takes a part of an axis, and marks its units, which are treated differently from now on."""
        size = len(range(*places.indices(axis.size)))
        if size == axis.size and (places.step or 1) == 1:
            return axis
        factors = self.labels(axis)
        if len(factors) != 1 or axis.is_fixed:
            self.freeze(axis)
            return fixed(size)
        taken = factors[0][places]
        if size == 1:
            self._frozen.update(taken[taken >= 0].tolist())
            return Axis(1)
        self._num_marks += 1
        for unit in taken[taken >= 0].tolist():
            self._marks[unit].add(self._num_marks)
        return Axis(size, (taken,))

    def join(self, axes: Sequence[Axis]) -> Axis:
        """Concatenates axes into one."""
        size = sum(axis.size for axis in axes)
        if any(len(self.labels(axis)) > 1 for axis in axes):
            for axis in axes:
                self.freeze(axis)
            return fixed(size)
        parts = [self.labels(axis)[0] if self.labels(axis) else np.array([FIXED]) for axis in axes]
        return Axis(size, (np.concatenate(parts),))

    def pad(self, axis: Axis, before: int, after: int) -> Axis:
        """Adds positions with one constant before and after an axis."""
        size = axis.size + before + after
        if min(before, after) < 0 or len(self.labels(axis)) != 1 or axis.is_fixed:
            self.freeze(axis)
            return fixed(size)
        constant = self._constant()
        return Axis(size, (np.pad(self.labels(axis)[0], (before, after), constant_values=constant),))

    def refold(self, axes: Sequence[Axis], sizes: Sequence[int]) -> list[Axis]:
        """Returns axes of other sizes over the same positions in the same order, as reshaping creates them."""
        remaining = (
            [labels for axis in axes for labels in self.labels(axis)] if len(axes) > 1 else self._split(axes, sizes)
        )
        found: list[Axis] = []
        for size in sizes:
            taken, filled = [], 1
            while remaining is not None and filled < size:
                labels, wanted = remaining.pop(0), size // filled
                if len(labels) > wanted and (labels == FIXED).all() and len(labels) % wanted == 0:
                    remaining.insert(0, labels[: len(labels) // wanted])
                    labels = labels[:wanted]
                taken.append(labels)
                filled *= len(labels)
                remaining = remaining if size % filled == 0 else None
            if remaining is None:
                for axis in axes:
                    self.freeze(axis)
                return [fixed(size) for size in sizes]
            found.append(Axis(size, tuple(taken)))
        return found

    def _split(self, axes: Sequence[Axis], sizes: Sequence[int]) -> list[np.ndarray] | None:
        """Returns the factors of a single axis; None if its labels are unknown and it is to be split into several."""
        (axis,) = axes
        return None if axis.factors is None and len(sizes) > 1 else list(self.labels(axis))

    def _filled(self, labels: np.ndarray) -> np.ndarray:
        filled = labels.copy()
        filled[labels < FIXED] = self.born(int((labels < FIXED).sum()))
        return filled

    def _tie(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        tied = one.copy()
        for place in np.flatnonzero(one != other).tolist():
            tied[place] = self._met(int(one[place]), int(other[place]))
        return tied

    def _met(self, one: int, other: int) -> int:
        if one < other:
            one, other = other, one
        if other >= 0:
            self._parent[self.find(one)] = self.find(other)
        elif one >= 0 and other == FIXED:
            self._frozen.add(one)
            return FIXED
        elif one >= 0:
            # Constants are negative, marks of cuts positive: they never meet.
            self._marks[one].add(other)
        elif one < FIXED:
            return self._constants.setdefault((one, other), self._constant())
        return one


def places_of(factors: Sequence[np.ndarray], which: int, place: int) -> np.ndarray:
    """Returns the positions on an axis whose index in factor `which` is `place`, in order, int64."""
    sizes = [len(labels) for labels in factors]
    outer, inner = math.prod(sizes[:which]), math.prod(sizes[which + 1 :])
    return (np.arange(outer)[:, None] * sizes[which] * inner + place * inner + np.arange(inner)).reshape(-1)
