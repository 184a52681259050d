from __future__ import annotations

import socket
from pathlib import Path

import pytest

from raywgen import ray_address
from raywgen.ray_address import ClusterError, check_address
from raywgen.training.session import ray_session


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_nobody_at_ray_address(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"{scheme}127.0.0.1:{closed_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ClusterError, match=f"no Ray cluster answers at {address} .*: start one"), ray_session():
        pytest.fail("a session without a cluster")


def test_somebody_who_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_address, "_TIMEOUT_SECONDS", 0.3)
    silent = socket.create_server(("127.0.0.1", 0))
    with silent, pytest.raises(ClusterError, match="no Ray cluster answers"):
        check_address(f"127.0.0.1:{silent.getsockname()[1]}")


def test_a_dashboards_address_is_for_jobs() -> None:
    with pytest.raises(ClusterError, match="is a dashboard: send the command by `raywgen job submit --address"):
        check_address("http://127.0.0.1:8265")


def test_a_token_file_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(ClusterError, match="holds no token"):
        check_address("127.0.0.1:1")
    (tmp_path / "token").write_text("abc")
    with pytest.raises(ClusterError, match="no Ray cluster answers"):
        check_address("127.0.0.1:1")
