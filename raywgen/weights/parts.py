"""Recognises files that hold only a part of a network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raywgen.weights.errors import WeightsError

_FLAT = ("flat_param", "_flat_param")
_GATHER = (
    "join them by the zero_to_fp32.py that DeepSpeed leaves beside them, or train with "
    "stage3_gather_16bit_weights_on_model_save"
)


def check_whole(state: Mapping[str, Any], beside: Mapping[Any, object], source: str) -> None:
    """Refuses a part of a network.

    Args:
        state: Tensors, or references to them, by name.
        beside: The top level of the file.
        source: The file, for the message.

    Raises:
        WeightsError: The tensors are a part of a network, or placeholders without values.
    """
    floating = [name for name, tensor in state.items() if tensor.dtype.is_floating_point]
    # A nested tensor has no shape, and is refused later.
    empty = [
        name for name in floating if not getattr(state[name], "is_nested", False) and tuple(state[name].shape) == (0,)
    ]
    if empty and (len(empty) * 2 >= len(floating) or "param_shapes" in beside or _names_parameters(empty)):
        raise WeightsError(
            f"{source}: {len(empty)} of {len(floating)} tensors hold no values, first '{empty[0]}': they are "
            f"placeholders of ZeRO stage 3, whose values lie in the optimizer's files; {_GATHER}"
        )
    if flat := [name for name in state if name.rpartition(".")[2].startswith(_FLAT)]:
        raise WeightsError(
            f"{source}: tensor '{flat[0]}' is a flat shard of FSDP, a part of a network; save a full state_dict"
        )
    # Indexed rather than by `get()`, which a pickle may replace on an OrderedDict.
    ranks = beside["mp_world_size"] if "mp_world_size" in beside else 1  # noqa: SIM401
    if isinstance(ranks, int) and ranks > 1:
        raise WeightsError(
            f"{source} is one of {ranks} parts of a network split by tensor parallelism; join them first"
        )


def _names_parameters(names: list[str]) -> bool:
    return any(name.rpartition(".")[2] in ("weight", "bias") for name in names)
