"""The device that a run trains on, decided once, before its workers start."""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from raywgen.nn.devices import device_text, resolved_device
from raywgen.training.config import TrainConfig


def with_device(config: TrainConfig) -> TrainConfig:
    """Returns the config of a run with `cpu` or `cuda` in place of `device=auto`, and says which in one line.

    `auto` takes a GPU where each worker can have one.

    Raises:
        DeviceError: A run without workers asks for a GPU, and this machine has none.
    """
    if config.max_workers == 0:
        device = resolved_device(config.device)
        chosen, text = device.type, device_text(device)
    elif config.device == "auto":
        chosen = "cuda" if num_gpus() >= config.min_workers else "cpu"
        text = "a GPU for each worker" if chosen == "cuda" else "CPUs"
    else:
        return config
    if config.device == "auto":
        print(f"{config.out} trains on {text}", file=sys.stderr, flush=True)
    return replace(config, device=chosen)


def num_gpus() -> int:
    """Returns the number of GPUs of the Ray session, or of this machine where there is none."""
    import ray

    if ray.is_initialized():
        return int(ray.cluster_resources().get("GPU", 0))
    return torch.cuda.device_count()
