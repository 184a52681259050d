"""Whether a run's workers can be placed at all, said before anything begins.

Without an autoscaler Ray Train asks for its workers again every minute, for ever. Readers of `source=ray` reserve
nothing, so that they start wherever workers do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from raywgen.compat import autoscaler_node_types
from raywgen.ray_address import ClusterError
from raywgen.training.config import TrainConfig

Resources = Mapping[str, float]

GROUP_LABEL = "raywgen/group-"
"""Begins a head node's labels that say what the autoscaler may add; open-source Ray keeps that to itself."""

_SHOWN = ("CPU", "GPU")
_REPORT_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Nodes:
    """The resources that a cluster has and may come to have.

    Attributes:
        alive: Resources of each node.
        most: Resources of each node once an autoscaler has added all it may; None where nobody knows.
    """

    alive: Sequence[Resources]
    most: Sequence[Resources] | None


def worker_request(config: TrainConfig) -> Resources:
    """Returns what each worker of a run takes."""
    return {"GPU": 1.0} if config.device == "cuda" else {"CPU": 1.0}


def worker_requests(config: TrainConfig) -> list[Resources]:
    """Returns what a run on Ray Train needs: a part for each of its fewest workers, and what else takes CPUs."""
    return [*[worker_request(config)] * config.min_workers, *[{"CPU": 1.0}] * _reading_cpus(config)]


def _reading_cpus(config: TrainConfig) -> int:
    """Returns how many CPUs are left to what reads the corpus beside the workers; readers of `source=ray` take none."""
    return 0 if config.source == "ray" else 1


def first_unplaceable(requests: Sequence[Resources], nodes: Sequence[Resources]) -> Resources | None:
    """The first bundle that finds no room, largest first, each on one node; None where all do."""
    free = [dict(node) for node in nodes]
    for request in sorted(requests, key=lambda request: sorted(request.values()), reverse=True):
        for node in free:
            if all(node.get(name, 0.0) >= amount for name, amount in request.items()):
                for name, amount in request.items():
                    node[name] -= amount
                break
        else:
            return request
    return None


def check_run(config: TrainConfig, nodes: Nodes) -> None:
    """Refuses a run whose workers would wait for ever, naming the number that would not.

    Raises:
        ClusterError: The cluster is too small and cannot grow enough.
    """
    room = nodes.alive if nodes.most is None else nodes.most
    if first_unplaceable(worker_requests(config), nodes.alive) is None or nodes.most is None:
        return
    if first_unplaceable(worker_requests(config), room) is None:
        return
    reading = _reading_cpus(config)
    kind = "GPU" if config.device == "cuda" else "CPU"
    fitting = _most_workers(config, room)
    remedy = f"give num_workers={fitting}" if fitting else "num_workers=0 trains in one process without them"
    more = " and one more CPU to read the corpus" if reading else ""
    raise ClusterError(
        f"num_workers={config.num_workers} asks for {config.min_workers} x 1 {kind}{more}, but "
        f"the cluster has {describe(room)}: {remedy}, or add nodes"
    )


def check_request(request: Resources, what: str, nodes: Nodes) -> None:
    """Refuses what no single node could ever hold.

    Raises:
        ClusterError: No node, there or to come, is large enough.
    """
    if nodes.most is not None and first_unplaceable([request], nodes.most) is not None:
        asked = " and ".join(f"{amount:g} {name}" for name, amount in request.items())
        raise ClusterError(f"{what} asks for {asked} on one node, but the cluster has {describe(nodes.most)}")


def describe(nodes: Sequence[Resources]) -> str:
    """Says in words how much of what is on how many nodes."""
    if not nodes:
        return "no node"
    parts = []
    for name in _SHOWN:
        amounts = [node.get(name, 0.0) for node in nodes]
        if sum(amounts) > 0:
            largest = f" (at most {max(amounts):g} on one)" if len(nodes) > 1 else ""
            parts.append(f"{sum(amounts):g} {name}{largest}")
    has = " and ".join(parts) or "neither CPU nor GPU"
    return f"{has} on {len(nodes)} {'node' if len(nodes) == 1 else 'nodes'}"


def connected_nodes(requests: Sequence[Resources]) -> Nodes:
    """Returns the nodes of the cluster that this process is connected to.

    Args:
        requests: The resources to be placed. If they fit on the nodes that are there, nobody is asked what else may
            come.
    """
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    resources = [node["Resources"] for node in alive]
    if first_unplaceable(requests, resources) is None:
        return Nodes(alive=resources, most=resources)
    return most_nodes([(node["Resources"], node.get("Labels") or {}) for node in alive], _reports)


def most_nodes(
    alive: Sequence[tuple[Resources, Mapping[str, str]]], reports: Callable[[], Iterator[Mapping[str, str] | None]]
) -> Nodes:
    """Returns what a cluster may grow to: by its head node's labels, else nothing where Ray's monitor only looks on.

    Args:
        alive: Resources and labels of each node.
        reports: Gives the monitor's reports until there is one; None while there is not.
    """
    resources = [node for node, _ in alive]
    labelled = [(node, labels) for node, labels in alive if any(label.startswith(GROUP_LABEL) for label in labels)]
    if labelled:
        head, labels = labelled[0]
        groups = [read_group(value) for label, value in labels.items() if label.startswith(GROUP_LABEL)]
        return Nodes(alive=resources, most=[head, *(group for count, group in groups for _ in range(count))])
    for report in reports():
        if report is not None:
            return Nodes(alive=resources, most=resources if _only_looks_on(report) else None)
    return Nodes(alive=resources, most=None)


def write_group(max_nodes: int, resources: Resources) -> str:
    """A group of nodes as a label's value: letters, digits, dashes and underscores are all it may hold."""
    return "_".join([f"max-{max_nodes}", *(f"{name}-{amount:g}" for name, amount in resources.items())])


def read_group(value: str) -> tuple[int, Resources]:
    """Reads what `write_group` wrote: the most nodes there may be, and what each has."""
    parts = dict(part.rsplit("-", 1) for part in value.split("_"))
    return int(parts.pop("max")), {name: float(amount) for name, amount in parts.items()}


def _reports() -> Iterator[Mapping[str, str] | None]:
    """Yields what the monitor of the connected cluster reports of node types, until it should have reported."""
    deadline = time.monotonic() + _REPORT_SECONDS  # The monitor writes every five seconds.
    while time.monotonic() < deadline:
        yield autoscaler_node_types()
        time.sleep(0.5)


def _only_looks_on(mapping: Mapping[str, str]) -> bool:
    """Whether each node is a type of its own, as where no autoscaler runs."""
    return bool(mapping) and all(kind == f"node_{node}" for node, kind in mapping.items())


def _most_workers(config: TrainConfig, room: Sequence[Resources]) -> int:
    fitting = 0
    while fitting < config.min_workers:
        if first_unplaceable(worker_requests(replace(config, num_workers=fitting + 1)), room) is not None:
            break
        fitting += 1
    return fitting
