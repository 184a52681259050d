"""Real clusters on this machine: nodes by `ray start`, free ports, a token of their own."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
_SIZES = {
    "tokenizer": {"num_steps": 3, "batch_size": 8, "quantiser.num_codes": 16, "quantiser.num_levels": 2},
    "prior": {"num_steps": 3, "batch_size": 8, "width": 16, "num_layers": 1, "num_heads": 2},
    "task_loss": {"num_steps": 3, "batch_size": 8},
}
SMALL = [f"generator.{stage}.{key}={value}" for stage, sizes in _SIZES.items() for key, value in sizes.items()]

_SEVERAL = """
import contextlib, io, json, sys
from raywgen.cli import main
answers = []
for command in json.loads(sys.argv[1]):
    text, status = io.StringIO(), 0
    sys.argv[1:] = command
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
    answers.append((status, text.getvalue()))
print(json.dumps(answers))
"""


@dataclass
class LocalCluster:
    """Nodes as processes, and what a client's shell would hold."""

    folder: str
    environment: dict[str, str]
    ports: list[int] = field(default_factory=lambda: _free_ports(16))
    nodes: list[subprocess.Popen[Any]] = field(default_factory=list)
    started: float = 0.0

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self.ports[1]}"

    @property
    def head(self) -> str:
        return f"127.0.0.1:{self.ports[0]}"

    def start(self, num_cpus: int, **resources: float) -> None:
        """The first node is the head."""
        agent, metrics = self.ports[3 + 2 * len(self.nodes) :][:2]
        where = ["--head", f"--port={self.ports[0]}", f"--dashboard-port={self.ports[1]}"]
        where += [f"--ray-client-server-port={self.ports[2]}", f"--temp-dir={self.folder}"]
        where = [f"--address={self.head}"] if self.nodes else where
        command = [str(BIN / "ray"), "start", "--block", f"--num-cpus={num_cpus}", *where]
        command += ["--object-store-memory=200000000"]
        command += [f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}"]
        command += [f"--resources={json.dumps(resources)}"] if resources else []
        silent: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
        self.nodes.append(subprocess.Popen(command, env=self.environment, **silent))
        self._wait_for_nodes(len(self.nodes))
        self.started = time.monotonic()

    def run(self, *command: str, **changes: str) -> subprocess.CompletedProcess[str]:
        """In the client's shell; a value of '' takes a variable away."""
        env = {name: value for name, value in (self.environment | changes).items() if value}
        path = str(BIN / command[0])
        return subprocess.run([path, *command[1:]], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)

    def raywgen(self, *commands: Sequence[str], **changes: str) -> list[tuple[int, str]]:
        """Status and output of each `raywgen` command, all in one process: importing costs more than they do."""
        done = self.run("python", "-c", _SEVERAL, json.dumps(commands), **changes)
        assert done.returncode == 0, done.stdout + done.stderr
        return [(status, text) for status, text in json.loads(done.stdout.splitlines()[-1])]

    def stop(self) -> None:
        # Not `ray stop`, which stops every Ray on the machine. A node that is asked to end takes half a minute.
        ended: list[psutil.Process] = []
        for node in self.nodes:
            with suppress(psutil.NoSuchProcess):
                head = psutil.Process(node.pid)
                ended += [head, *head.children(recursive=True)]
        for process in ended:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(ended, timeout=60)

    def _wait_for_nodes(self, count: int) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            assert all(node.poll() is None for node in self.nodes), "a node did not start"
            if _answers(self.ports[1]) and self._num_alive() == count:
                return
            time.sleep(0.5)
        raise TimeoutError(f"{count} nodes did not come up")

    def _num_alive(self) -> int:
        """How many nodes there are once the job server, which starts apart from the dashboard, answers too."""
        token = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        try:  # A dashboard that is starting drops what comes, or answers with something else.
            nodes, jobs = (
                requests.get(f"{self.dashboard}{path}", headers=token, timeout=30)
                for path in ("/api/v0/nodes", "/api/jobs/")
            )
            found = nodes.json().get("data", {}).get("result", {}).get("result", []) if nodes.ok and jobs.ok else []
        except requests.RequestException:
            return 0
        return sum(node["state"] == "ALIVE" for node in found)


@contextmanager
def local_cluster(nodes: Sequence[dict[str, Any]]) -> Iterator[LocalCluster]:
    """Starts one node for each mapping of `num_cpus` and custom resources."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # The job's `python` must be the one that has raywgen.
    env |= {"PATH": f"{BIN}:{env['PATH']}", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    # Ray kills workers where others fill the machine's memory, whatever these take.
    env |= {"PYTHONPATH": str(ROOT), "COLUMNS": "200", "RAY_memory_monitor_refresh_ms": "0"}
    with tempfile.TemporaryDirectory(prefix="rw", dir="/tmp") as folder:  # Sockets allow 107 bytes of path.
        cluster = LocalCluster(folder, env)
        try:
            for node in nodes:
                cluster.start(**node)
            cluster.environment = env | {"RAY_API_SERVER_ADDRESS": cluster.dashboard}
            yield cluster
        finally:
            cluster.stop()


@pytest.fixture(scope="session")
def one_node() -> Iterator[LocalCluster]:
    """A head node of four CPUs."""
    with local_cluster([{"num_cpus": 4}]) as cluster:
        yield cluster


def _free_ports(count: int) -> list[int]:
    """Below the range from which the system hands out ports, and outside that of Ray's own workers."""
    found: list[int] = []
    for port in range(20000 + os.getpid() % 5000, 32000):
        if not _answers(port):
            found.append(port)
        if len(found) == count:
            break
    return found


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
