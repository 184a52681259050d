"""Makes a user's own module run on flat samples, and checks it before anything is generated for it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from raywgen.tasks.user_sources import ConditionError

_TRIED = 2
_LOGITS = "logits"


def runnable(module: nn.Module, inputs: Sequence[Tensor], num_classes: int, name: str = "") -> tuple[nn.Module, Tensor]:
    """Returns a float32 copy in eval mode on the CPU that maps flat samples `(S, F)` to logits `(S, C)`.

    The module itself is left as it is, and so are the names in its `state_dict`.

    Args:
        module: The module, as `taken_inputs` takes it.
        inputs: The samples, as `taken_inputs` takes them.
        num_classes: Least number of outputs.
        name: Name of the module in messages.

    Returns:
        The copy, and the inputs that it runs on, flat.

    Raises:
        ConditionError: `taken_inputs` refuses the module.
    """
    copied, x = taken_inputs(module, inputs, num_classes, name)
    copied.register_forward_pre_hook(partial(_given_shape, tuple(x.shape[1:]), x.dtype))
    if num_classes:
        copied.register_forward_hook(_only_logits)
    return copied, x.reshape(len(x), -1).float()


@torch.no_grad()
def taken_inputs(
    module: nn.Module, inputs: Sequence[Tensor], num_classes: int, name: str = ""
) -> tuple[nn.Module, Tensor]:
    """Finds the first of several inputs that a module runs on, by running a copy of it on a few samples.

    Args:
        module: Any module. If its output is a mapping or a Hugging Face output, the `logits` are taken; if it is a
            tuple, the first tensor.
        inputs: The same samples in the shapes and dtypes that may be meant, the likeliest first.
        num_classes: Least number of outputs; 0 where these need not be logits.
        name: Name of the module in messages; its class by default.

    Returns:
        The copy, float32 and in eval mode on the CPU, and the inputs.

    Raises:
        ConditionError: The module cannot be copied, raises on all of the inputs, or its outputs are no logits of so
            many classes. The message is about the first of the inputs.
    """
    name = name or type(module).__name__
    if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        raise ConditionError(f"{name} lies on the meta device and has no values; build it on the CPU")
    try:
        copied = copy.deepcopy(module).cpu().float().eval()
    except Exception as error:  # Parts of a module may raise anything when they are copied.
        raise ConditionError(
            f"{name} cannot be copied ({_first_line(error)}); give a module that copy.deepcopy takes"
        ) from error
    failures: list[str] = []
    for x in _meant(inputs):
        try:
            output = copied(x[:_TRIED])
            if num_classes:
                _check_logits(output, name, num_classes, min(len(x), _TRIED))
            return copied, x
        except ConditionError as error:
            failures.append(str(error))
        except Exception as error:  # A user's own module may raise anything.
            failures.append(
                f"{name} does not run on samples of shape {list(x.shape[1:])} ({_first_line(error)}); give samples "
                "in the shape that it takes, or say `input_shape: [C, H, W]` in its recipe"
            )
    # A module that ran and gave something odd says more than one that was handed the wrong shape.
    raise ConditionError(next((failure for failure in failures if "does not run" not in failure), failures[0]))


def _meant(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Returns the inputs as floats, then those of integers as they are, each shape once."""
    tried: dict[tuple[Any, ...], Tensor] = {}
    for x in [*(x.float() for x in inputs), *inputs]:
        tried.setdefault((tuple(x.shape), x.dtype), x)
    return list(tried.values())


def _check_logits(output: Any, name: str, num_classes: int, num_samples: int) -> None:
    logits = _tensor_of(output)
    if logits is None:
        raise ConditionError(
            f"{name} gives a {type(output).__name__}; give a module that returns logits, a tensor [S, C]"
        )
    if logits.dim() != 2 or logits.shape[0] != num_samples or not logits.is_floating_point():
        raise ConditionError(
            f"{name} gives outputs of shape {list(logits.shape)} for {num_samples} samples; give a module with one "
            "logit a class, a float tensor [S, C]"
        )
    if logits.shape[1] < num_classes:
        raise ConditionError(
            f"{name} has {logits.shape[1]} outputs, the labels name {num_classes} classes; give a module with an "
            "output for each class, or labels from 0 without gaps"
        )


def _tensor_of(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        found = output.get(_LOGITS)
    elif hasattr(output, _LOGITS):
        found = getattr(output, _LOGITS)
    else:
        found = output[0] if isinstance(output, tuple | list) and output else None
    return found if isinstance(found, Tensor) else None


def _given_shape(
    shape: tuple[int, ...], dtype: torch.dtype, _: nn.Module, inputs: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    x_SF, *rest = inputs
    return x_SF.reshape(len(x_SF), *shape).to(dtype), *rest


def _only_logits(_: nn.Module, __: Any, output: Any) -> Tensor:
    logits = _tensor_of(output)
    assert logits is not None, "its first run gave some"
    return logits.float()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
