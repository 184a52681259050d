"""Looks at a run before Ray is started for it, which takes many seconds: what could not work is said at once."""

from __future__ import annotations

import os

import torch

from raywgen.config import ConfigError
from raywgen.corpus.manifest import MANIFEST, read_manifest
from raywgen.corpus.storage import CorpusStorage
from raywgen.generators.settings import StageConfig
from raywgen.nn.devices import resolved_device
from raywgen.out_folder import checked_out
from raywgen.ray_address import ClusterError
from raywgen.storage import Storage
from raywgen.training.config import TrainConfig
from raywgen.training.resource_check import Nodes, check_run
from raywgen.training.session import num_local_cpus


def check_early(config: TrainConfig) -> None:
    """Refuses a run that could not begin.

    Raises:
        ConfigError: Its settings name no corpus, or a folder that is none, or more workers than a batch has networks.
        OutError: Nothing can or should be written to its run folder.
        CorpusError: There is no corpus, or its manifest is damaged.
        DeviceError, ClusterError: It is to run on GPUs or CPUs that this machine does not have, and on no cluster.
    """
    _check_device(config)
    if not config.corpus.strip():
        raise ConfigError(f"corpus is empty; name the corpus to train on, such as corpus={TrainConfig.corpus}")
    _check_out(checked_out(config.out, TrainConfig.out))
    check_batches(config)
    _check_room(config)
    read_manifest(CorpusStorage.at(config.corpus))


def check_batches(config: TrainConfig) -> None:
    """Refuses batches with fewer networks than there are workers, or a worker's share with fewer than its parts.

    Raises:
        ConfigError: The message names the batch, and what to lower.
    """
    num_workers, accumulate = max(1, config.max_workers), config.accumulate
    for name, stage in vars(config.generator).items():
        if not isinstance(stage, StageConfig) or not stage.num_steps:
            continue
        if stage.batch_size < num_workers:
            raise ConfigError(
                f"num_workers={num_workers} is more than the networks of a batch, generator.{name}.batch_size="
                f"{stage.batch_size}; give at most as many workers as networks"
            )
        if stage.batch_size // num_workers < accumulate:
            raise ConfigError(
                f"accumulate={accumulate} is more than the {stage.batch_size // num_workers} networks that a worker "
                f"takes of generator.{name}.batch_size={stage.batch_size}; give at most that many parts"
            )


def _check_out(out: str) -> None:
    if Storage.at(out).size(MANIFEST) is not None:
        raise ConfigError(f"out={out} holds a corpus; name another folder for the run, such as out={TrainConfig.out}")


def _check_room(config: TrainConfig) -> None:
    """Refuses more workers than a Ray that is started on this machine would have room for."""
    if not config.max_workers:
        return
    import ray

    if not os.environ.get("RAY_ADDRESS") and not ray.is_initialized():
        here = {"CPU": float(num_local_cpus()), "GPU": float(torch.cuda.device_count())}
        check_run(config, Nodes(alive=[here], most=[here]))


def _check_device(config: TrainConfig) -> None:
    if config.max_workers == 0:
        resolved_device(config.device)
        return
    import ray

    if config.device != "cuda" or os.environ.get("RAY_ADDRESS") or ray.is_initialized():
        return  # Whoever made the session knows what it has, and a launch compares them.
    wanted, found = config.min_workers, torch.cuda.device_count()
    if found < wanted:
        fewer = f"num_workers={found} fits it" if found else "give device=cpu to train on its CPUs"
        raise ClusterError(
            f"num_workers={config.num_workers} device=cuda asks for {wanted} GPU{'s' * (wanted > 1)}, and this machine "
            f"has {found or 'none'}: {fewer}, or set RAY_ADDRESS to a cluster that has them"
        )
