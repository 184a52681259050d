"""Reads a layout as layers of units: which axis of each tensor holds which units.

A generator that writes units needs no more than this of an architecture, so that widths and depths are just numbers.
Everything is read off names, shapes and order of a layout; the module itself is not needed. Layers are taken for a
chain. Where they are none (a residual sum), the units of two axes that are one in truth still have equal codes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from raywgen.weights import Layout, TensorSpec

_MATRICES = ("weight", "embedding")
_NORMS = ("norm_scale", "norm_shift", "running_mean", "running_var")
_MOST_FOLLOWED = 1 << 18
_LOG_SCALE = 6.0
_DEPTH_SCALE = 8.0
_PLACE_FREQUENCIES = 3
NUM_AXIS_FACTS = 11
NUM_PLACE_FEATURES = 4 + 4 * _PLACE_FREQUENCIES


@dataclass(frozen=True, slots=True)
class UnitAxis:
    """Units that lie along an axis of one or several tensors.

    Attributes:
        num_units: n.
        depth: Number of the axis in the network, from 0 for the inputs.
        fan_in: Values that a unit reads.
        has_bias: Whether each unit has a bias of its own.
        has_norm: Whether a normalisation follows it.
        kernel_in: Places of the kernel by which it reads; 1 for a matrix.
    """

    num_units: int
    depth: int
    fan_in: int = 1
    has_bias: bool = False
    has_norm: bool = False
    kernel_in: int = 1


@dataclass(frozen=True, slots=True)
class UnitTensor:
    """One tensor, as units.

    Attributes:
        spec: The tensor.
        axis_out: The axis of its rows, or of its values where it has one axis.
        axis_in: The axis of its columns; None for a vector.
        grid: Height and width of its kernel, or of the places that each unit of `axis_in` has along the columns.
        is_kernel: Whether `grid` is that of a kernel.
    """

    spec: TensorSpec
    axis_out: int
    axis_in: int | None = None
    grid: tuple[int, int] = (1, 1)
    is_kernel: bool = False

    @property
    def num_places(self) -> int:
        """Places of each pair of units."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True, slots=True)
class UnitLayout:
    """A layout as axes of units, from inputs to outputs, and tensors along them, in the order of the flat vector."""

    axes: tuple[UnitAxis, ...]
    tensors: tuple[UnitTensor, ...]
    output: int

    @property
    def is_followed(self) -> bool:
        """Whether samples can be followed through the layers.

        Through large networks that would take as long as to train them. Those with normalisation layers are mostly
        residual sums, which no layout shows; they need it less, as a normalisation keeps the size of all units.
        """
        num_values = sum(tensor.spec.num_values for tensor in self.tensors)
        return num_values <= _MOST_FOLLOWED and not any(axis.has_norm for axis in self.axes)

    def pooling(self, num_features: int) -> int:
        """Returns by how much maps are taken to be pooled after each kernel; 1 where nothing says that they are.

        Layers of pooling have no weights. But where a chain of kernels ends in a matrix, the places of each channel
        along its columns say how often the maps of the inputs were halved, if each time by as much.

        Args:
            num_features: Values of a sample.
        """
        kernels = [tensor for tensor in self.tensors if tensor.is_kernel]
        ends = [tensor for tensor in self.tensors if tensor.axis_in is not None and not tensor.is_kernel]
        if not kernels or not ends:
            return 1
        assert kernels[0].axis_in is not None
        side, (height, width) = math.isqrt(num_features // self.axes[kernels[0].axis_in].num_units), ends[0].grid
        factor = round((side / height) ** (1 / len(kernels)))
        return factor if height == width and height * factor ** len(kernels) == side else 1

    def facts(self) -> Tensor:
        """Returns what is known of each axis, float32 `(num_axes, NUM_AXIS_FACTS)`."""
        last = max(1, max(axis.depth for axis in self.axes))
        rows = []
        for place, axis in enumerate(self.axes):
            is_output = place == self.output
            share = axis.depth / last
            rows.append(
                [
                    float(place == 0),
                    float(is_output),
                    share,
                    math.sin(math.pi * share),
                    last / _DEPTH_SCALE,
                    axis.depth / _DEPTH_SCALE,
                    math.log(axis.num_units) / _LOG_SCALE,
                    math.log(axis.fan_in) / _LOG_SCALE,
                    float(axis.has_bias),
                    float(axis.has_norm),
                    math.log(axis.kernel_in) / _LOG_SCALE,
                ]
            )
        return torch.tensor(rows)


@lru_cache(maxsize=1024)
def unit_layout(layout: Layout) -> UnitLayout:
    """Reads a layout as layers of units.

    A matrix or kernel begins a layer, and reads the units of the layer before it. If its columns are a multiple of
    those, each unit has several places among them, as after flattening. Otherwise it reads the last axis of that size,
    or units of its own. A vector lies along the last axis of its length; so does a stack of matrices of which there is
    one, such as a table of positions.
    """
    axes: list[UnitAxis] = []
    tensors = [_matrix(axes, spec) if _is_matrix(spec) else _vector(axes, spec) for spec in layout.generated]
    output = max((tensor.axis_out for tensor in tensors if tensor.axis_in is not None), default=len(axes) - 1)
    return UnitLayout(tuple(axes), tuple(tensors), output)


def _is_matrix(spec: TensorSpec) -> bool:
    if spec.kind not in _MATRICES or len(spec.shape) < 2 or min(spec.shape) < 1:
        return False
    # A token or a table of positions, of which there is one, has no units that it is written from.
    return len(spec.shape) == 2 or spec.shape[0] > 1


def _matrix(axes: list[UnitAxis], spec: TensorSpec) -> UnitTensor:
    rows, columns, kernel = spec.shape[0], spec.shape[1], spec.real_shape[2:]
    axis_in, num_places = _read_axis(axes, columns)
    grid, is_kernel = (_grid(num_places), False) if not kernel else (_kernel_grid(kernel), True)
    num_kernel = grid[0] * grid[1] if is_kernel else 1
    depth = axes[axis_in].depth + 1
    axes.append(UnitAxis(rows, depth, fan_in=columns * num_kernel, kernel_in=num_kernel))
    return UnitTensor(spec, len(axes) - 1, axis_in, grid, is_kernel)


def _read_axis(axes: list[UnitAxis], columns: int) -> tuple[int, int]:
    """Returns the axis that a matrix reads, and the places of each of its units."""
    if axes and columns % axes[-1].num_units == 0 and (axes[-1].num_units > 1 or columns == 1):
        return len(axes) - 1, columns // axes[-1].num_units
    return _axis_of(axes, columns), 1


def _vector(axes: list[UnitAxis], spec: TensorSpec) -> UnitTensor:
    place = _axis_of(axes, max(1, spec.num_values))
    if spec.kind == "bias":
        axes[place] = replace(axes[place], has_bias=True)
    elif spec.kind in _NORMS:
        axes[place] = replace(axes[place], has_norm=True)
    return UnitTensor(spec, place)


def _axis_of(axes: list[UnitAxis], num_units: int) -> int:
    """Returns the last axis of a size, which is added where there is none."""
    for place in range(len(axes) - 1, -1, -1):
        if axes[place].num_units == num_units:
            return place
    axes.append(UnitAxis(num_units, axes[-1].depth if axes else 0))
    return len(axes) - 1


def _grid(num_places: int) -> tuple[int, int]:
    side = math.isqrt(num_places)
    return (side, side) if side * side == num_places else (1, num_places)


def _kernel_grid(kernel: tuple[int, ...]) -> tuple[int, int]:
    return (math.prod(kernel[:-1]), kernel[-1])


@lru_cache(maxsize=256)
def place_features(grid: tuple[int, int], is_kernel: bool) -> Tensor:
    """Returns features of each place of a grid, float32 `(num_places, NUM_PLACE_FEATURES)`; treat it as read-only."""
    sides = [(torch.arange(size) + 0.5) / size - 0.5 for size in grid]
    at_V2 = torch.stack(torch.meshgrid(*sides, indexing="ij"), dim=-1).reshape(-1, 2)
    angles = [2 * math.pi * at_V2 * 2**power for power in range(_PLACE_FREQUENCIES)]
    waves = [wave for angle in angles for wave in (angle.sin(), angle.cos())]
    several = float(len(at_V2) > 1)
    flags = torch.tensor([several, several * is_kernel]).expand(len(at_V2), 2)
    # A single place has no features, so that matrices are written as if there were no places.
    return torch.cat([flags, several * at_V2, *(several * wave for wave in waves)], dim=-1)
