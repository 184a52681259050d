"""Looks at a run before Ray is started for it, which takes many seconds: what could not work is said at once."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from raywgen.config import ConfigError
from raywgen.corpus.manifest import MANIFEST, read_manifest
from raywgen.corpus.storage import CorpusStorage
from raywgen.nn.devices import resolved_device
from raywgen.ray_address import ClusterError
from raywgen.training.config import TrainConfig


def check_early(config: TrainConfig) -> None:
    """Refuses a run that could not begin.

    Raises:
        ConfigError: Its settings name no corpus, or a folder that is none.
        CorpusError: There is no corpus, or its manifest is damaged.
        DeviceError, ClusterError: It is to run on GPUs that this machine does not have, and on no cluster.
    """
    _check_device(config)
    if not config.corpus.strip():
        raise ConfigError(f"corpus is empty; name the corpus to train on, such as corpus={TrainConfig.corpus}")
    _check_out(config.out)
    read_manifest(CorpusStorage.at(config.corpus))


def _check_out(out: str) -> None:
    if Path(out).is_file():
        raise ConfigError(f"out={out} is a file; name a folder for the run, such as out={TrainConfig.out}")
    if (Path(out) / MANIFEST).is_file():
        raise ConfigError(f"out={out} holds a corpus; name another folder for the run, such as out={TrainConfig.out}")


def _check_device(config: TrainConfig) -> None:
    if config.num_workers == 0:
        resolved_device(config.device)
        return
    import ray

    if config.device != "cuda" or os.environ.get("RAY_ADDRESS") or ray.is_initialized():
        return  # Whoever made the session knows what it has, and a launch compares them.
    wanted, found = config.num_workers, torch.cuda.device_count()
    if found < wanted:
        fewer = f"num_workers={found} fits it" if found else "give device=cpu to train on its CPUs"
        raise ClusterError(
            f"num_workers={wanted} device=cuda asks for {wanted} GPU{'s' * (wanted > 1)}, and this machine has "
            f"{found or 'none'}: {fewer}, or set RAY_ADDRESS to a cluster that has them"
        )
