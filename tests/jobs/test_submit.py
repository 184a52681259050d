"""`ray start --head`, then `ray job submit` of the shipped scripts, as a user of a cluster does."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import raywgen
from raywgen.corpus import Corpus

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
_SIZES = {
    "tokenizer": {"num_steps": 3, "batch_size": 8, "num_codes": 16, "num_levels": 2},
    "prior": {"num_steps": 3, "batch_size": 8, "width": 16, "num_layers": 1, "num_heads": 2},
    "functional": {"num_steps": 3, "batch_size": 8},
}
SMALL = [f"generator.{stage}.{key}={value}" for stage, sizes in _SIZES.items() for key, value in sizes.items()]


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """A head node of its own on free ports, with a token of its own; gives what a client's shell would hold."""
    head, dashboard, client, agent, metrics = _free_ports(5)
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # The job's `python` must be the one that has raywgen.
    env |= {"PATH": f"{BIN}:{env['PATH']}", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    with tempfile.TemporaryDirectory(prefix="rw", dir="/tmp") as folder:  # Sockets allow 107 bytes of path.
        command = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=4", f"--temp-dir={folder}"]
        command += [f"--port={head}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
        command += [f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}"]
        node = subprocess.Popen(
            command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            _wait_for(dashboard, node)
            yield env | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
        finally:
            # Not `ray stop`, which stops every Ray on the machine.
            node.send_signal(signal.SIGTERM)
            node.wait(timeout=60)


def submit(environment: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    told = ["--address", environment["RAY_API_SERVER_ADDRESS"], "--working-dir", str(ROOT), "--", *command]
    return subprocess.run(
        [str(BIN / "ray"), "job", "submit", *told], env=environment, capture_output=True, text=True, timeout=300
    )


def test_training_and_generation_as_jobs(environment: dict[str, str], zoo_corpus: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "igpg"
    where = [f"corpus={zoo_corpus.location}", f"out={out}"]
    train = ("python", "jobs/train.py", "configs/igpg/digits.yaml", *where, "zero_stage=2", *SMALL)
    done = submit(environment, *train)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout
    assert raywgen.load(out).generator.method == "igpg"
    written = submit(
        environment,
        *("python", "jobs/generate.py", f"generator={out}", f"corpus={zoo_corpus.location}"),
        *(f"out={tmp_path / 'networks'}", "best_of=2", "limit=1"),
    )
    assert written.returncode == 0, written.stdout + written.stderr
    assert len(list((tmp_path / "networks").glob("*.safetensors"))) == 2
    many = submit(
        environment,
        *("python", "jobs/generate.py", f"generator={out}", f"corpus={zoo_corpus.location}"),
        *(f"out={tmp_path / 'many'}", "best_of=2", "limit=1", "num=5", "--where", "ray", "--into", "corpus"),
    )
    assert many.returncode == 0, many.stdout + many.stderr
    assert Corpus.open(tmp_path / "many").facts.num_rows == 5 * 2


def test_a_mistake_is_one_clear_line_and_a_failed_job(environment: dict[str, str], tmp_path: Path) -> None:
    done = submit(environment, "python", "jobs/train.py", "configs/igpg/digits.yaml", f"out={tmp_path}", "sed=1")
    assert done.returncode != 0
    assert "did you mean 'seed'?" in done.stdout
    assert "Traceback" not in done.stdout


def _free_ports(count: int) -> list[int]:
    """Below the range from which the system hands out ports, and outside that of Ray's own workers."""
    found: list[int] = []
    for port in range(20000 + os.getpid() % 5000, 32000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                found.append(port)
        if len(found) == count:
            break
    return found


def _wait_for(port: int, node: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert node.poll() is None, "the head node did not start"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    raise TimeoutError("the head node's dashboard did not come up")
