from __future__ import annotations

import pytest

from raywgen.cluster.connect import connect
from raywgen.ray_address import ClusterError
from tests.test_ray_address import closed_port


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
