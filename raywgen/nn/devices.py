"""The device that a process computes on: its CPU, or a GPU."""

from __future__ import annotations

import sys
from typing import Literal

import torch

Device = Literal["auto", "cpu", "cuda"]


class DeviceError(ValueError):
    """A GPU is asked for where there is none; the message says what to do."""


def resolved_device(name: Device) -> torch.device:
    """Returns the device of a name; `auto` is a GPU where there is one.

    Raises:
        DeviceError: `cuda` is asked for, and torch finds no GPU.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise DeviceError(f"device=cuda: {_reason()}; give device=auto or device=cpu to compute on the CPU")
    return torch.device("cuda", torch.cuda.current_device())


def seed_torch(seed: int, device: torch.device) -> None:
    """Seeds torch's own generators of the CPU and of a device.

    `torch.manual_seed` also leaves a note for each kind of device that is not in use, with the stack of its caller,
    which takes a millisecond.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def device_text(device: torch.device) -> str:
    """Returns a device in words: `the CPU`, or the kind of GPU with its number."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else "the CPU"


def say_device(what: str, asked: Device, device: torch.device) -> None:
    """Prints one line to standard error: what is done on which device, where the user left that open."""
    if asked == "auto":
        print(f"{what} on {device_text(device)}", file=sys.stderr, flush=True)


def _reason() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} was built without GPUs"
    return "torch finds no GPU on this machine"
