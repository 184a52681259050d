"""Checks that a Ray cluster answers and accepts the token, because Ray itself would retry for minutes."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

from raywgen.compat import request_cluster_id

_TIMEOUT_SECONDS = 5.0
_TOKEN_HELP = (
    "export RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) with the cluster's, which "
    "`ray get-auth-token` prints on its head node"
)


class ClusterError(RuntimeError):
    """A cluster that cannot be used; the message names the remedy."""


def check_address(address: str) -> None:
    """Refuses a `RAY_ADDRESS` at which nobody answers, or whose cluster rejects the token.

    Ray would retry both for minutes and end without a reason. `auto` and `local` name no cluster and pass.

    Raises:
        ClusterError: Nobody answers, the token is refused, or the address is a dashboard's.
    """
    if address in ("auto", "local"):
        return
    check_token_file()
    if address.startswith(("http://", "https://")):
        raise ClusterError(
            f"RAY_ADDRESS={address} is a dashboard: send the command by `raywgen job submit --address {address}`, or "
            "give RAY_ADDRESS as host:port of the head node (port 6379 by default)"
        )
    if "://" in address:
        check_port(address)
    else:
        _check_head(address)


def check_port(address: str) -> None:
    """Refuses a URL at whose port nobody listens.

    Raises:
        ClusterError: Nobody listens there, or the address has no port.
    """
    parts = urlsplit(address)
    try:
        port = parts.port or {"http": 80, "https": 443, "ray": 10001}.get(parts.scheme)
    except ValueError:
        port = None
    if not parts.hostname or port is None:
        raise ClusterError(f"'{address}' is no address; give for instance http://127.0.0.1:8265")
    try:
        socket.create_connection((parts.hostname, port), timeout=_TIMEOUT_SECONDS).close()
    except OSError as error:
        raise unreachable(address, str(error.strerror or error)) from error


def check_token_file() -> None:
    """Refuses a missing token file, at which Ray would end the process without a message.

    Raises:
        ClusterError: `RAY_AUTH_TOKEN_PATH` names no file, or an empty one.
    """
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if not path or os.environ.get("RAY_AUTH_TOKEN"):
        return
    if not Path(path).is_file() or not Path(path).read_text().strip():
        raise ClusterError(f"RAY_AUTH_TOKEN_PATH={path} holds no token; write the cluster's there, or {_TOKEN_HELP}")


def refused_token(address: str) -> ClusterError:
    """Returns the message for a cluster that refuses the token or asks for one."""
    mode = os.environ.get("RAY_AUTH_MODE", "")
    sent = "the token" if mode == "token" else "a client without token"
    return ClusterError(f"Ray at {address} refuses {sent}: {_TOKEN_HELP}")


def unreachable(address: str, reason: str) -> ClusterError:
    """Returns the message for an address at which nobody answers."""
    return ClusterError(
        f"no Ray cluster answers at {address} ({reason}): start one, mend RAY_ADDRESS or --address, or forward the "
        "port, as by `kubectl port-forward service/raywgen-head-svc 8265`"
    )


def _check_head(address: str) -> None:
    import grpc

    try:
        request_cluster_id(address, _TIMEOUT_SECONDS)
    except grpc.RpcError as error:
        # Errors of calls also implement `grpc.Call`, which their base class does not declare.
        code = error.code() if isinstance(error, grpc.Call) else None
        if code == grpc.StatusCode.UNAUTHENTICATED:
            raise refused_token(address) from error
        reason = "nobody listens there" if code == grpc.StatusCode.UNAVAILABLE else "no answer within 5 s"
        raise unreachable(address, reason) from error
