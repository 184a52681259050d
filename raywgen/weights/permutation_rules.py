"""Rules by which the operations of a traced network carry hidden units from their inputs to their outputs.

A rule takes the units and the arguments of an ATen operation, with each tensor given by its axes, and returns the axes
of the result. An operation without a rule fixes the units of all its inputs in place, which is always exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from raywgen.weights.permutation_axes import Axis, HiddenUnits, fixed

Axes = tuple[Axis, ...]
Shape = tuple[int, ...]
Rule = Callable[..., Any]
"""`rule(units, shape, *arguments, **named)`, in which `shape` is that of the first result."""
RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


def pointwise(units: HiddenUnits, shape: Shape, *args: Any, **named: Any) -> Axes:
    """Ties units position by position, with broadcasting."""
    result = [Axis(1) if size == 1 else None for size in shape]
    for axes in filter(_is_tensor, (*args, *named.values())):
        for place, axis in enumerate(axes, start=len(shape) - len(axes)):
            if axis.size > 1:
                known = result[place]
                result[place] = axis if known is None else units.same(known, axis)
    return tuple(fixed(size) if axis is None else axis for axis, size in zip(result, shape, strict=True))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(axis, Axis) for axis in value)


@_rule(
    "clone", "detach", "alias", "contiguous", "_to_copy", "lift_fresh_copy", "lift_fresh", "_softmax", "_log_softmax"
)
def _unchanged(units: HiddenUnits, shape: Shape, x: Axes, *_: Any, **__: Any) -> Axes:
    return x


@_rule("zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like")
def _constant(units: HiddenUnits, shape: Shape, *_: Any, **__: Any) -> Axes:
    return tuple(units.all_equal(size) for size in shape)


@_rule("mm")
def _mm(units: HiddenUnits, shape: Shape, a: Axes, b: Axes) -> Axes:
    units.same(a[1], b[0])
    return a[0], b[1]


@_rule("mv")
def _mv(units: HiddenUnits, shape: Shape, a: Axes, b: Axes) -> Axes:
    units.same(a[1], b[0])
    return (a[0],)


@_rule("addmm")
def _addmm(units: HiddenUnits, shape: Shape, bias: Axes, a: Axes, b: Axes, **_: Any) -> Axes:
    return pointwise(units, shape, _mm(units, shape, a, b), bias)


@_rule("bmm")
def _bmm(units: HiddenUnits, shape: Shape, a: Axes, b: Axes) -> Axes:
    units.same(a[2], b[1])
    return units.same(a[0], b[0]), a[1], b[2]


@_rule("convolution")
def _convolution(
    units: HiddenUnits,
    shape: Shape,
    x: Axes,
    weight: Axes,
    bias: Axes | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    is_transposed: bool,
    output_padding: Any,
    groups: int,
) -> Axes:
    out, into = (weight[1], weight[0]) if is_transposed else weight[:2]
    channels = x[1]
    _freeze(units, (*x[2:], *weight[2:]))
    if groups == 1:
        units.same(into, channels)
    elif groups == channels.size == out.size and not is_transposed:
        out = units.same(out, channels)
    else:
        _freeze(units, (out, into, channels))
        out = fixed(shape[1])
    if bias is not None:
        out = units.same(out, bias[0])
    return x[0], out, *map(fixed, shape[2:])


@_rule(
    "native_batch_norm",
    "_native_batch_norm_legit_no_training",
    "_native_batch_norm_legit",
    "cudnn_batch_norm",
    "miopen_batch_norm",
    "batch_norm",
)
def _batch_norm(units: HiddenUnits, shape: Shape, x: Axes, *args: Any, **_: Any) -> tuple[Axes, ...]:
    channels = x[1]
    for axes in filter(_is_tensor, args):
        channels = units.same(channels, axes[0])
    return (x[0], channels, *x[2:]), (), (), ()


@_rule("native_layer_norm")
def _layer_norm(
    units: HiddenUnits, shape: Shape, x: Axes, sizes: Sequence[int], weight: Axes | None, bias: Axes | None, eps: float
) -> tuple[Axes, ...]:
    scaled = pointwise(units, shape, x, *(axes for axes in (weight, bias) if axes is not None))
    rest = (*x[: -len(sizes)], *(Axis(1) for _ in sizes))
    return scaled, rest, rest


@_rule("native_group_norm")
def _group_norm(
    units: HiddenUnits,
    shape: Shape,
    x: Axes,
    weight: Axes | None,
    bias: Axes | None,
    N: int,
    C: int,
    HxW: int,
    groups: int,
    _: float,
) -> tuple[Axes, ...]:
    channels = x[1]
    for axes in (weight, bias):
        channels = channels if axes is None else units.same(channels, axes[0])
    channels = channels if groups in (1, C) else units.freeze(channels)
    stats = (fixed(shape[0]), fixed(groups))
    return (x[0], channels, *x[2:]), stats, stats


@_rule(
    "avg_pool2d",
    "max_pool2d_with_indices",
    "_adaptive_avg_pool2d",
    "adaptive_max_pool2d",
    "upsample_nearest2d",
    "upsample_bilinear2d",
    "upsample_bicubic2d",
)
def _pool(units: HiddenUnits, shape: Shape, x: Axes, *_: Any, **__: Any) -> Axes:
    _freeze(units, x[-2:])
    return *x[:-2], *map(fixed, shape[-2:])


@_rule("mean", "sum", "amax", "amin", "var", "std", "prod", "logsumexp", "any", "all", "var_mean")
def _reduce(units: HiddenUnits, shape: Shape, x: Axes, dims: Any = None, *_: Any, **__: Any) -> Axes:
    """Reduces axes: a sum over units does not depend on their order."""
    if dims is None or isinstance(dims, bool) or dims == []:
        dims = range(len(x))
    gone = {dim % len(x) for dim in ([dims] if isinstance(dims, int) else dims)}
    if len(shape) == len(x):
        return tuple(Axis(1) if dim in gone else axis for dim, axis in enumerate(x))
    return tuple(axis for dim, axis in enumerate(x) if dim not in gone)


@_rule("view", "reshape", "_unsafe_view", "_reshape_alias")
def _view(units: HiddenUnits, shape: Shape, x: Axes, *_: Any) -> Axes:
    remaining, result = [axis for axis in x if axis.size != 1], []
    sizes = [size for size in shape if size != 1]
    while sizes:
        old, new = [remaining.pop(0)], [sizes.pop(0)]
        while (have := math.prod(axis.size for axis in old)) != (want := math.prod(new)):
            if have < want:
                old.append(remaining.pop(0))
            else:
                new.append(sizes.pop(0))
        result += old if len(old) == len(new) == 1 else units.refold(old, new)
    return tuple(Axis(1) if size == 1 else result.pop(0) for size in shape)


@_rule("t")
def _t(units: HiddenUnits, shape: Shape, x: Axes) -> Axes:
    return x[::-1]


@_rule("permute")
def _permute(units: HiddenUnits, shape: Shape, x: Axes, dims: Sequence[int]) -> Axes:
    return tuple(x[dim] for dim in dims)


@_rule("transpose")
def _transpose(units: HiddenUnits, shape: Shape, x: Axes, one: int, other: int) -> Axes:
    axes = list(x)
    axes[one], axes[other] = axes[other], axes[one]
    return tuple(axes)


@_rule("unsqueeze", "squeeze", "expand")
def _ones(units: HiddenUnits, shape: Shape, x: Axes, *args: Any, **_: Any) -> Axes:
    """Adds, removes or expands axes of size 1; the others stay in order."""
    remaining = [axis for axis in x if axis.size != 1]
    kept = shape if len([size for size in shape if size != 1]) == len(remaining) else None
    if kept is not None:
        return tuple(Axis(1) if size == 1 else remaining.pop(0) for size in shape)
    old = [Axis(1)] * (len(shape) - len(x)) + list(x)
    return tuple(axis if axis.size == size else fixed(size) for axis, size in zip(old, shape, strict=True))


@_rule("slice")
def _slice(
    units: HiddenUnits,
    shape: Shape,
    x: Axes,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Axes:
    axes = list(x)
    axes[dim] = units.cut(axes[dim], slice(start, end, step))
    return tuple(axes)


@_rule("select")
def _select(units: HiddenUnits, shape: Shape, x: Axes, dim: int, index: int) -> Axes:
    index %= x[dim].size
    units.cut(x[dim], slice(index, index + 1))
    axes = list(x)
    del axes[dim]
    return tuple(axes)


@_rule("split", "unsafe_split", "split_with_sizes", "unsafe_split_with_sizes")
def _split(units: HiddenUnits, shape: Shape, x: Axes, sizes: int | Sequence[int], dim: int = 0) -> tuple[Axes, ...]:
    if isinstance(sizes, int):
        sizes = [min(sizes, x[dim].size - start) for start in range(0, x[dim].size, sizes)]
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return tuple(_slice(units, shape, x, dim, start, start + size) for start, size in zip(starts, sizes, strict=True))


@_rule("unbind")
def _unbind(units: HiddenUnits, shape: Shape, x: Axes, dim: int = 0) -> tuple[Axes, ...]:
    return tuple(_select(units, shape, x, dim, index) for index in range(x[dim].size))


@_rule("cat")
def _cat(units: HiddenUnits, shape: Shape, parts: Sequence[Axes], dim: int = 0) -> Axes:
    dim %= len(shape)
    joined = units.join([part[dim] for part in parts])
    others = [part[:dim] + part[dim + 1 :] for part in parts]
    rest = pointwise(units, shape[:dim] + shape[dim + 1 :], *others)
    return (*rest[:dim], joined, *rest[dim:])


@_rule("constant_pad_nd")
def _pad(units: HiddenUnits, shape: Shape, x: Axes, widths: Sequence[int], *_: Any) -> Axes:
    axes = list(x)
    for place in range(len(widths) // 2):
        before, after = widths[2 * place : 2 * place + 2]
        if before or after:
            axes[-1 - place] = units.pad(axes[-1 - place], before, after)
    return tuple(axes)


@_rule("embedding")
def _embedding(units: HiddenUnits, shape: Shape, weight: Axes, index: Axes, *_: Any) -> Axes:
    units.freeze(weight[0])
    return *freeze_all(units, shape[:-1], index), weight[1]


def freeze_all(units: HiddenUnits, shape: Shape, *args: Any, **named: Any) -> Axes:
    """Applies to operations without a rule: fixes the units of all inputs in place."""
    for value in (*args, *named.values()):
        if _is_tensor(value):
            _freeze(units, value)
        elif isinstance(value, list | tuple):
            freeze_all(units, (), *value)
    return tuple(fixed(size) for size in shape)


def _freeze(units: HiddenUnits, axes: Sequence[Axis]) -> None:
    for axis in axes:
        units.freeze(axis)
