"""A Ray cluster of several nodes on this machine, and a training command on it, both to be broken on purpose."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from raywgen.benchmarks.chaos_runs import RunView
from raywgen.config import load_config, save_config
from raywgen.training import TrainConfig, launch
from raywgen.training.run_folder import is_done

# A node counts as lost after some seconds, and no worker is killed because others fill the machine's memory.
_SYSTEM = {"health_check_initial_delay_ms": 2000, "health_check_period_ms": 1000, "health_check_failure_threshold": 4}
_OBJECT_STORE_BYTES = 80 << 20


class LocalCluster:
    """A head without CPUs, and nodes of one CPU each, all on this machine.

    Args:
        num_nodes: Nodes beside the head.
    """

    def __init__(self, num_nodes: int) -> None:
        from ray.cluster_utils import Cluster

        os.environ |= {"RAY_memory_monitor_refresh_ms": "0"}
        head = {"num_cpus": 0, "object_store_memory": _OBJECT_STORE_BYTES, "_system_config": _SYSTEM}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(num_nodes):
            self.add_node()

    @property
    def address(self) -> str:
        """Host and port of the head."""
        return str(self._cluster.address)

    @property
    def num_nodes(self) -> int:
        """Number of nodes beside the head."""
        return len(self._cluster.worker_nodes)

    def add_node(self) -> None:
        """Adds a node of one CPU."""
        self._cluster.add_node(num_cpus=1, object_store_memory=_OBJECT_STORE_BYTES)

    def remove_node_of(self, pid: int) -> None:
        """Kills all processes of the node on which a process runs."""
        self._cluster.remove_node(self._node_of(pid), allow_graceful=False)

    def announce_end_of_node_of(self, pid: int, seconds: int) -> None:
        """Tells Ray that the node on which a process runs will be taken away, as a cloud's autoscaler does."""
        told = ["--address", self.address, "--node-id", self.node_id_of(pid), "--reason-message", "spot instance"]
        told += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--deadline-remaining-seconds", str(seconds)]
        subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", "drain-node", *told], check=True, stdout=sys.stderr
        )

    def kill_raylet_of(self, pid: int) -> None:
        """Kills the raylet alone of the node on which a process runs; its workers then end by themselves."""
        node = self._node_of(pid)
        node.kill_raylet(check_alive=False)
        self._cluster.worker_nodes.discard(node)

    def node_id_of(self, pid: int) -> str:
        """Returns Ray's id of the node on which a process runs."""
        return self._node_of(pid).node_id

    def stop(self) -> None:
        """Ends all processes of the cluster."""
        self._cluster.shutdown()

    def _node_of(self, pid: int) -> Any:
        ancestors = set(_ancestors(pid))
        for node in self._cluster.worker_nodes:
            if any(info.process.pid in ancestors for info in node.all_processes["raylet"]):
                return node
        raise ProcessLookupError(f"process {pid} runs on no node")


@contextmanager
def local_cluster(num_nodes: int) -> Iterator[LocalCluster]:
    """Starts a cluster for a block."""
    cluster = LocalCluster(num_nodes)
    try:
        yield cluster
    finally:
        cluster.stop()


class TrainCommand:
    """A command that trains runs one after another with the same workers, in a process of its own on a cluster.

    Args:
        configs: The runs.
        address: Host and port of the cluster's head.

    Attributes:
        view: The run under way.
    """

    def __init__(self, configs: list[TrainConfig], address: str) -> None:
        self.view = RunView(Path(configs[0].out))
        self._files, self._log = [f"{config.out}.yaml" for config in configs], Path(f"{configs[0].out}.log")
        for config, file in zip(configs, self._files, strict=True):
            save_config(config, file)
        self._environment = os.environ | {"RAY_ADDRESS": address}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Gives the command, for the first time or again."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, *self._files],
                env=self._environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def is_over(self) -> bool:
        """Whether the process has ended."""
        return self._process is None or self._process.poll() is not None

    def is_done(self) -> bool:
        """Whether the run under way is trained, or the process has ended."""
        return self.is_over() or is_done(self.view.out)

    def kill(self) -> None:
        """Kills the process, if it still runs."""
        if self._process is not None and not self.is_over():
            self._process.kill()
            self._process.wait()

    def output(self) -> str:
        """Returns all that the command has printed."""
        return self._log.read_text(errors="replace")

    def pids(self) -> list[int]:
        """Returns the process of each worker, by rank, as they were started last."""
        starts = self.view.starts()
        return [int(found[1]) for place in starts[-1].places if (found := re.search(r"process (\d+)", place))]


def main() -> None:
    """Trains the runs whose config files are the arguments."""
    from raywgen.training.session import ray_session

    configs = [load_config(TrainConfig, file) for file in sys.argv[1:]]
    with ray_session():
        launch(configs)


def _ancestors(pid: int) -> Iterator[int]:
    with suppress(OSError):
        while pid > 1:
            yield pid
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


if __name__ == "__main__":
    main()
