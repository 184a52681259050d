"""The resources that one trial needs of a cluster, and how many trials can run without waiting for each other.

A trial holds one CPU itself. While it trains on workers these hold one CPU or one GPU each, and Ray Data's tasks,
which feed them, need one more free CPU. Ray takes nothing back from a waiting trial, so no more trials may begin than
could all train at once; a trial whose workers are a range counts with its most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raywgen.config import ConfigError
from raywgen.training import TrainConfig
from raywgen.training.resource_check import Nodes, Resources, connected_nodes


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """The CPUs and GPUs that a node has, in whole units."""

    cpus: int
    gpus: int = 0


def _uses_gpus(train: TrainConfig) -> bool:
    return train.device == "cuda"


def cpus_of_trial(num_workers: int, use_gpu: bool) -> int:
    """Returns a trial's logical CPUs: its own, and with workers one for their data and, without GPUs, one for each."""
    return 1 if num_workers == 0 else 2 if use_gpu else 2 + num_workers


def cluster_nodes(train: TrainConfig) -> list[Node]:
    """Returns the nodes of the Ray session and, where no trial fits on them, those that its autoscaler may add."""
    return nodes_to_come(train, connected_nodes(_requests(train)))


def nodes_to_come(train: TrainConfig, cluster: Nodes) -> list[Node]:
    """Returns all nodes that the cluster can have; an unknown number to be added counts as room for one trial."""
    known = cluster.alive if cluster.most is None else cluster.most
    nodes = [Node(cpus=int(has.get("CPU", 0)), gpus=int(has.get("GPU", 0))) for has in known]
    if cluster.most is None and trials_at_once(nodes, train.max_workers, _uses_gpus(train)) == 0:
        cpus = cpus_of_trial(train.max_workers, _uses_gpus(train))
        nodes.append(Node(cpus=cpus, gpus=train.max_workers if _uses_gpus(train) else 0))
    return nodes


def _requests(train: TrainConfig) -> list[Resources]:
    """Returns the resources of one trial in single units."""
    gpus = train.max_workers if _uses_gpus(train) else 0
    return [*[{"CPU": 1.0}] * cpus_of_trial(train.max_workers, _uses_gpus(train)), *[{"GPU": 1.0}] * gpus]


def trials_at_once(nodes: Sequence[Node], num_workers: int, use_gpu: bool) -> int:
    """Returns the most trials that can all train at once, wherever Ray places them; 0 where not even one can.

    Everything is requested in single units, so that no unit is lost between nodes.
    """
    fit = sum(node.cpus for node in nodes) // cpus_of_trial(num_workers, use_gpu)
    if num_workers and use_gpu:
        fit = min(fit, sum(node.gpus for node in nodes) // num_workers)
    return fit


def check_resources(nodes: Sequence[Node], train: TrainConfig, requested: int) -> int:
    """Returns the number of trials to run at once.

    Args:
        nodes: Nodes of the cluster.
        train: Training config of a trial.
        requested: Maximum that the user has set; 0 for as many as fit.

    Raises:
        ConfigError: Not even one trial fits, or fewer than requested.
    """
    workers, use_gpu = train.max_workers, _uses_gpus(train)
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    has = f"this cluster has {cpus} CPUs and {gpus} GPUs on {len(nodes)} node{'s' * (len(nodes) != 1)}"
    needs = f"a trial of train.num_workers={train.num_workers} needs {cpus_of_trial(workers, use_gpu)} CPUs"
    if workers:
        needs += f"{f' and {workers} GPUs' * use_gpu} (itself, its data, {workers} workers)"
    fit = trials_at_once(nodes, workers, use_gpu)
    if fit == 0:
        remedy = "set train.device=cpu, or a lower train.num_workers" if gpus < workers and use_gpu else ""
        remedy = remedy or "set a lower train.num_workers, or 0 for one process,"
        raise ConfigError(f"{needs}, and {has}; {remedy} in `fixed`")
    if requested > fit:
        raise ConfigError(
            f"max_concurrent={requested}: {needs}, and {has}: at most {fit} at once; 0 takes as many as fit"
        )
    return requested or fit
