"""Whether a Ray cluster answers and takes the token, asked once before Ray itself would wait for minutes."""

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
    """A cluster that cannot be used as asked; the message names the remedy."""


def check_address(address: str) -> None:
    """Refuses an address of `RAY_ADDRESS` that nobody answers at, or whose cluster takes no such token.

    Ray retries both for minutes and ends without a reason. `auto` and `local` name no cluster and pass.

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
    """Refuses a token file that is not there: Ray would end the process without a word.

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
        # Every error of a call that was made is a call too; only the base class does not say so.
        code = error.code() if isinstance(error, grpc.Call) else None
        if code == grpc.StatusCode.UNAUTHENTICATED:
            raise refused_token(address) from error
        reason = "nobody listens there" if code == grpc.StatusCode.UNAVAILABLE else "no answer within 5 s"
        raise unreachable(address, reason) from error
