"""What one trial asks of a cluster, and how many of them never wait for each other.

A trial holds one CPU itself. While it trains on workers these hold one CPU each, or one GPU, and Ray Data's tasks,
which feed them, must find one more CPU free. Nothing is taken back from a trial that waits, so only so many may begin
as could all train at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raywgen.config import ConfigError
from raywgen.training import TrainConfig
from raywgen.training.resource_check import Nodes, Resources, connected_nodes


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What a node has in all, in whole units."""

    cpus: int
    gpus: int = 0


def cpus_of_trial(num_workers: int, use_gpu: bool) -> int:
    """Logical CPUs: the trial itself, and with workers one for their data and, without GPUs, one for each."""
    return 1 if num_workers == 0 else 2 if use_gpu else 2 + num_workers


def cluster_nodes(train: TrainConfig) -> list[Node]:
    """The nodes of the Ray session, and where one trial finds no room on them, those that its autoscaler may add."""
    return nodes_to_come(train, connected_nodes(_requests(train)))


def nodes_to_come(train: TrainConfig, told: Nodes) -> list[Node]:
    """All nodes that there can be. Where nobody knows how many may be added, they are taken to hold one trial."""
    known = told.alive if told.most is None else told.most
    nodes = [Node(cpus=int(has.get("CPU", 0)), gpus=int(has.get("GPU", 0))) for has in known]
    if told.most is None and trials_at_once(nodes, train.num_workers, train.use_gpu) == 0:
        cpus = cpus_of_trial(train.num_workers, train.use_gpu)
        nodes.append(Node(cpus=cpus, gpus=train.num_workers if train.use_gpu else 0))
    return nodes


def _requests(train: TrainConfig) -> list[Resources]:
    """What one trial asks for, in single units."""
    gpus = train.num_workers if train.use_gpu else 0
    return [*[{"CPU": 1.0}] * cpus_of_trial(train.num_workers, train.use_gpu), *[{"GPU": 1.0}] * gpus]


def trials_at_once(nodes: Sequence[Node], num_workers: int, use_gpu: bool) -> int:
    """The most trials that all can train at once, wherever Ray puts them; 0 where not even one can.

    Everything is asked for in single units, so that no unit is lost between nodes.
    """
    fit = sum(node.cpus for node in nodes) // cpus_of_trial(num_workers, use_gpu)
    if num_workers and use_gpu:
        fit = min(fit, sum(node.gpus for node in nodes) // num_workers)
    return fit


def check_resources(nodes: Sequence[Node], train: TrainConfig, asked: int) -> int:
    """Trials to run at once.

    Args:
        nodes: Of the cluster.
        train: Of a trial.
        asked: At most so many; 0 for as many as fit.

    Raises:
        ConfigError: Not even one fits, or fewer than asked for; nothing has begun, and nothing would ever wait.
    """
    workers, use_gpu = train.num_workers, train.use_gpu
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    has = f"this cluster has {cpus} CPUs and {gpus} GPUs on {len(nodes)} node{'s' * (len(nodes) != 1)}"
    needs = f"a trial of train.num_workers={workers} needs {cpus_of_trial(workers, use_gpu)} CPUs"
    if workers:
        needs += f"{f' and {workers} GPUs' * use_gpu} (itself, its data, {workers} workers)"
    fit = trials_at_once(nodes, workers, use_gpu)
    if fit == 0:
        remedy = "set train.use_gpu=false, or a lower train.num_workers" if gpus < workers and use_gpu else ""
        remedy = remedy or "set a lower train.num_workers, or 0 for one process,"
        raise ConfigError(f"{needs}, and {has}; {remedy} in `fixed`")
    if asked > fit:
        raise ConfigError(f"max_concurrent={asked}: {needs}, and {has}: at most {fit} at once; 0 takes as many as fit")
    return asked or fit
