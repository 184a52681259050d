"""Looks at a run before Ray is started for it, which takes many seconds: what could not work is said at once."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from raywgen.config import ConfigError
from raywgen.corpus.manifest import MANIFEST, read_manifest
from raywgen.corpus.storage import Storage
from raywgen.ray_address import ClusterError
from raywgen.training.config import TrainConfig


def check_early(config: TrainConfig) -> None:
    """Refuses a run that could not begin.

    Raises:
        ConfigError: Its settings contradict each other, or name no corpus.
        CorpusError: There is no corpus, or its manifest is damaged.
        ClusterError: It is to run on GPUs that this machine does not have, and on no cluster.
    """
    check_settings(config)
    if not config.corpus.strip():
        raise ConfigError(f"corpus is empty; name the corpus to train on, such as corpus={TrainConfig.corpus}")
    _check_out(config.out)
    read_manifest(Storage.at(config.corpus))
    if config.use_gpu and not os.environ.get("RAY_ADDRESS"):
        _check_gpus(config.num_workers)


def check_settings(config: TrainConfig) -> None:
    """Refuses settings that contradict each other.

    Raises:
        ConfigError: GPUs are asked for, and no workers that would use them.
    """
    if config.use_gpu and config.num_workers == 0:
        raise ConfigError(
            "use_gpu=true and num_workers=0: without workers a run trains in this process on its CPU; give "
            "num_workers=1 to train on one GPU, or leave use_gpu out"
        )


def _check_out(out: str) -> None:
    if Path(out).is_file():
        raise ConfigError(f"out={out} is a file; name a folder for the run, such as out={TrainConfig.out}")
    if (Path(out) / MANIFEST).is_file():
        raise ConfigError(f"out={out} holds a corpus; name another folder for the run, such as out={TrainConfig.out}")


def _check_gpus(wanted: int) -> None:
    import ray

    if ray.is_initialized():
        return  # Whoever made the session knows what it has, and a launch compares them.
    found = torch.cuda.device_count()
    if found < wanted:
        fewer = f"num_workers={found} fits it" if found else "leave use_gpu out to train on its CPUs"
        raise ClusterError(
            f"num_workers={wanted} use_gpu=true asks for {wanted} GPU{'s' * (wanted > 1)}, and this machine has "
            f"{found or 'none'}: {fewer}, or set RAY_ADDRESS to a cluster that has them"
        )
