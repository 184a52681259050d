"""The matrix products that known GPUs can do in a second, from which their utilisation follows, and their memory."""

from __future__ import annotations

import re
from typing import Literal

import torch

_TERA = 1e12
# Dense rates of the vendor's data sheets in 10^12 operations a second: bfloat16 with float32 sums, and float32. The
# first pattern that a device's name holds counts.
_PEAKS = {
    r"H200 NVL": (835.0, 60.0),
    r"H200|GH200": (989.4, 66.9),
    r"H100 NVL": (835.0, 60.0),
    r"H100 PCIe": (756.0, 51.0),
    r"H100": (989.4, 66.9),
    r"A100": (312.0, 19.5),
    r"A40\b": (149.7, 37.4),
    r"L40S": (362.0, 91.6),
    r"L4\b": (121.0, 30.3),
    r"RTX 4090\b": (165.2, 82.6),
    r"RTX 3090\b": (71.0, 35.6),
}

# Gigabytes of the data sheets, of the variant with the most where a name leaves several open.
_MEMORY = {
    r"B200|GB200": 192,
    r"H200|GH200": 144,
    r"H100 NVL": 94,
    r"H100": 96,
    r"H20\b": 96,
    r"A100.*40": 40,
    r"A100": 80,
    r"A40\b|A6000|L40|L40S": 48,
    r"RTX [34]090\b|A10G?\b|L4\b|A30\b": 24,
    r"V100": 32,
    r"T4\b|P100": 16,
}


def named_memory(name: str) -> int | None:
    """Returns the bytes of memory of a GPU by its name, at most; None where the name is not known."""
    found = next((size for pattern, size in _MEMORY.items() if re.search(pattern, name)), None)
    return None if found is None else found * 10**9


def peak_flops(device: torch.device, precision: Literal["bf16", "fp32"]) -> float | None:
    """Returns the floating-point operations a second that a device can do at most; None where that is not known."""
    return None if device.type != "cuda" else named_peak(torch.cuda.get_device_name(device), precision)


def named_peak(name: str, precision: Literal["bf16", "fp32"]) -> float | None:
    """Returns the same of a GPU by its name, such as `NVIDIA H100 80GB HBM3`."""
    for pattern, (bf16, fp32) in _PEAKS.items():
        if re.search(pattern, name):
            if precision == "bf16":
                return bf16 * _TERA
            # TF32 runs at half the rate of bfloat16 on all of these.
            return (fp32 if torch.get_float32_matmul_precision() == "highest" else bf16 / 2) * _TERA
    return None
