"""The precision in which matrices are multiplied while a network is trained.

Parameters, moments and losses stay float32; under `bf16` matrix products and convolutions run in bfloat16 (autocast).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

Precision = Literal["auto", "bf16", "fp32"]


def resolved(precision: Precision, device_type: str = "cpu") -> Literal["bf16", "fp32"]:
    """Returns `bf16` or `fp32`; `auto` becomes bf16 where the processor has units for it.

    Args:
        precision: The setting.
        device_type: `cpu` or `cuda`.
    """
    if precision != "auto":
        return precision
    return "bf16" if _has_units(device_type) else "fp32"


def autocast(precision: str, device_type: str = "cpu") -> AbstractContextManager[object]:
    """Returns a context in which a resolved precision holds."""
    if precision == "fp32" and not torch.amp.is_autocast_available(device_type):
        return nullcontext()  # Such a device has no other precision.
    return torch.autocast(device_type, torch.bfloat16, enabled=precision == "bf16")


def _has_units(device_type: str) -> bool:
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Without such units bf16 is emulated: slower than fp32.
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)
