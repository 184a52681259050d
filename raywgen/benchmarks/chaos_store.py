"""A local S3 server that stops answering for a while, while a run trains into it."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from raywgen.benchmarks.chaos_processes import Group
from raywgen.benchmarks.chaos_runs import Losses, Outcome, RunView, loss_difference, losses_of, wait_for
from raywgen.training import TrainConfig

_BUCKET = "chaos"
_PATIENCE = 120.0
_SECONDS = 30.0


def stop_store(config: TrainConfig, wanted: Losses) -> Outcome:
    """Trains a run into an S3 server that does not answer for 30 seconds.

    Args:
        config: The run, in one process.
        wanted: Losses of the undisturbed run.
    """
    log = Path(f"{config.out}.log")
    run = replace(config, out=f"s3://{_BUCKET}/run")
    view = RunView(run.out)
    with _s3_server() as server:
        group = Group(run, 0, log=log)  # Before this process reads the store, whose client survives no fork.
        wait_for(lambda: group.is_over() or view.saved() >= 2 * config.checkpoint_every, _PATIENCE, "two checkpoints")
        os.kill(server, signal.SIGSTOP)
        time.sleep(_SECONDS)
        os.kill(server, signal.SIGCONT)
        began = time.monotonic()
        outcome = Outcome("storage stopped for 30 s")
        if not group.end():
            return outcome
        difference = loss_difference(losses_of(view.out), wanted)
        return replace(outcome, seconds=time.monotonic() - began).with_losses(difference)


@contextmanager
def _s3_server() -> Iterator[int]:
    """Starts a server with an empty bucket in a process of its own, yields its number, and points S3 clients at it."""
    import boto3

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = multiprocessing.get_context("fork").Process(target=_serve, args=(port,), daemon=True)
    process.start()
    address = f"http://127.0.0.1:{port}"
    settings = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    settings |= {"AWS_ENDPOINT_URL": address}
    before = {name: os.environ.get(name) for name in settings}
    os.environ |= settings
    try:
        wait_for(lambda: _answers(port), _PATIENCE, "the S3 server")
        boto3.client("s3").create_bucket(Bucket=_BUCKET)
        assert process.pid is not None, "the process was started"
        yield process.pid
    finally:
        process.kill()
        process.join()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _serve(port: int) -> None:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False).start()
    signal.pause()


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
