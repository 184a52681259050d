from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

import aiohttp
import pytest
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from raywgen.cluster import connect as connecting
from raywgen.cluster import submit as submitting
from raywgen.cluster.connect import connect, patiently
from raywgen.cluster.submit import find, follow
from raywgen.ray_address import ClusterError
from tests.test_ray_address import closed_port

JOB = {"type": "SUBMISSION", "submission_id": "a", "entrypoint": "python jobs/tune.py", "status": "SUCCEEDED"}


def test_no_job_server(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    address = f"http://127.0.0.1:{closed_port()}"
    with pytest.raises(ClusterError, match=f"no Ray cluster answers at {address}"):
        connect(address)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", address)
    with pytest.raises(ClusterError, match=f"no Ray cluster answers at {address}"):
        connect()
    with pytest.raises(ClusterError, match="'http://' is no address"):
        connect("http://")


@dataclass
class Dashboard:
    """Answers as Ray's does, but drops the connections of its next requests first."""

    address: str
    num_to_drop: int = 0
    status: int = 200
    asked: list[str] = field(default_factory=list)


@contextmanager
def dashboard_that_drops() -> Iterator[Dashboard]:
    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            dashboard.asked.append(f"{self.command} {self.path}")
            if dashboard.num_to_drop > 0:
                dashboard.num_to_drop -= 1
                self.close_connection = True
                return
            body = json.dumps({"ray_version": "2.49.0"} if self.path == "/api/version" else JOB).encode()
            self.send_response(200 if self.path == "/api/version" else dashboard.status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = _answer

        def log_message(self, format: str, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    dashboard = Dashboard(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield dashboard
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Dashboard]:
    monkeypatch.setattr(connecting, "_PAUSES", (0.0, 0.0))
    with dashboard_that_drops() as found:
        yield found


def test_what_only_asks_is_asked_again_after_a_dropped_connection(dashboard: Dashboard) -> None:
    dashboard.num_to_drop = 2
    client = connect(dashboard.address)
    assert dashboard.asked[:3] == ["GET /api/version"] * 3
    dashboard.asked.clear()
    dashboard.num_to_drop = 2
    assert find(client, "a").entrypoint == JOB["entrypoint"]
    assert dashboard.asked == ["GET /api/jobs/a"] * 3


def test_a_dashboard_that_drops_everything_is_named(dashboard: Dashboard) -> None:
    client = connect(dashboard.address)
    dashboard.num_to_drop = 100
    expected = f"the dashboard at {dashboard.address} dropped 3 connections in a row .*give the command again"
    with pytest.raises(ClusterError, match=expected):
        find(client, "a")
    with pytest.raises(ClusterError, match=expected):
        connect(dashboard.address)


def test_a_drop_without_a_message_is_named_by_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connecting, "_PAUSES", ())

    def ask() -> None:
        raise TimeoutError("")

    with pytest.raises(ClusterError, match=r"dropped 1 connections in a row \(TimeoutError\)"):
        patiently("http://here", ask, TimeoutError)


def test_what_changes_something_is_sent_once(dashboard: Dashboard) -> None:
    client = connect(dashboard.address)
    dashboard.num_to_drop = 1
    with pytest.raises(ClusterError, match="`raywgen job list` shows whether the request was carried out"):
        client.submit_job(entrypoint="python jobs/tune.py")
    assert [asked for asked in dashboard.asked if asked.startswith("POST")] == ["POST /api/jobs/"]


@pytest.mark.parametrize(
    ("status", "message"), [(404, "knows no job 'a'; `raywgen job list`"), (500, "did not tell about job 'a' .*500")]
)
def test_a_job_that_is_unknown_and_a_server_that_fails_are_told_apart(
    dashboard: Dashboard, status: int, message: str
) -> None:
    client = connect(dashboard.address)
    dashboard.status = status
    with pytest.raises(ClusterError, match=message):
        find(client, "a")


class Flaky:
    """A client whose log breaks off: each element is what one connection sends before its error."""

    def __init__(self, *connections: tuple[list[str], Exception | None]) -> None:
        self._connections = list(connections)

    async def tail_job_logs(self, _: str) -> AsyncIterator[str]:
        lines, error = self._connections.pop(0)
        for line in lines:
            await asyncio.sleep(0)
            yield line
        if error is not None:
            raise error

    def get_job_info(self, _: str) -> Any:
        state = JobStatus.RUNNING if self._connections else JobStatus.SUCCEEDED
        return JobDetails.model_validate(JOB | {"status": state})


def test_a_log_is_taken_up_where_its_connection_broke(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submitting, "_AGAIN_SECONDS", 0.0)
    flaky = Flaky(
        (["one\n", "two\n"], RuntimeError("WebSocket connection closed unexpectedly with close code 1006")),
        (["one\ntw"], aiohttp.ServerDisconnectedError()),
        (["one\ntwo\nthr", "ee\n"], None),
        (["one\n", "two\nthree\nfour\n"], None),
    )
    written: list[str] = []
    assert follow(cast("JobSubmissionClient", flaky), "a", written.append) == "SUCCEEDED"
    assert written == ["one\n", "two\n", "thr", "ee\n", "four\n"]


def test_a_log_that_nobody_reads_any_more_is_not_read_again() -> None:
    def closed(_: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        follow(cast("JobSubmissionClient", Flaky((["one\n"], None))), "a", closed)
