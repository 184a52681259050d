"""What one trial asks of a cluster, and how many of them never wait for each other.

A trial of workers holds one CPU itself. While it trains, its workers hold one CPU each (and one GPU), and Ray Data's
tasks, which feed them, must find one more free. Nothing is taken back from a trial that waits, so trials may begin only
where all of them could train at once, wherever Ray has put the trials themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raywgen.config import ConfigError
from raywgen.training import TrainConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What a node has in all, in whole units."""

    cpus: int
    gpus: int = 0


def cpus_of_trial(num_workers: int) -> int:
    """Logical CPUs: the trial itself, and with workers also these and one for their data."""
    return 1 if num_workers == 0 else 2 + num_workers


def cluster_nodes() -> list[Node]:
    """The nodes of the Ray session."""
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(cpus=int(has.get("CPU", 0)), gpus=int(has.get("GPU", 0))) for has in alive]


def trials_at_once(nodes: Sequence[Node], num_workers: int, use_gpu: bool) -> int:
    """The most trials that all can train at once, wherever Ray puts them; 0 where not even one can.

    The trials themselves take CPUs anywhere. In the worst case they take those beside the GPUs.
    """
    total = sum(node.cpus for node in nodes)
    most = total // cpus_of_trial(num_workers)
    if num_workers == 0 or not use_gpu:
        return most
    places_T = _fewest_places(nodes, 2 * most)
    # Both the trials and the tasks that feed their workers may stand beside a GPU.
    return next((num for num in range(most, 0, -1) if places_T[2 * num] >= num * num_workers), 0)


def _fewest_places(nodes: Sequence[Node], most_taken: int) -> list[int]:
    """For each number of CPUs taken where it hurts most, the places left for workers of one CPU and one GPU each."""
    whole = sum(min(node.cpus, node.gpus) for node in nodes)
    lost_T = [0] + [-1] * most_taken  # -1: so many CPUs cannot be taken
    for node in nodes:
        spare = max(0, node.cpus - node.gpus)
        after_T = list(lost_T)
        for taken, lost in enumerate(lost_T):
            if lost < 0:
                continue
            for here in range(1, min(node.cpus, most_taken - taken) + 1):
                after_T[taken + here] = max(after_T[taken + here], lost + max(0, here - spare))
        lost_T = after_T
    return [whole - lost if lost >= 0 else -1 for lost in lost_T]


def check_resources(nodes: Sequence[Node], train: TrainConfig, asked: int) -> int:
    """Trials to run at once.

    Args:
        nodes: Of the cluster.
        train: Of a trial.
        asked: At most so many; 0 for as many as fit.

    Raises:
        ConfigError: Not even one fits, or fewer than asked for; nothing has begun, and nothing would ever wait.
    """
    workers = train.num_workers
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    has = f"this cluster has {cpus} CPUs and {gpus} GPUs on {len(nodes)} node{'s' * (len(nodes) != 1)}"
    needs = f"a trial of train.num_workers={workers} needs {cpus_of_trial(workers)} CPUs"
    if workers:
        needs += f" (itself, its data, {workers} workers{' with a GPU each' * train.use_gpu})"
    if workers and train.use_gpu and not any(node.gpus and node.cpus for node in nodes):
        raise ConfigError(f"a worker asks for a CPU and a GPU, and no node has both: {has}; set train.use_gpu=false")
    fit = trials_at_once(nodes, workers, train.use_gpu)
    if fit == 0:
        raise ConfigError(f"{needs}, and {has}; set a lower train.num_workers in `fixed`, or 0 for one process")
    if asked > fit:
        raise ConfigError(f"max_concurrent={asked}: {needs}, and {has}: at most {fit} at once; 0 takes as many as fit")
    return asked or fit
