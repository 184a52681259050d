"""Connects to a cluster's job server; a missing server or a wrong token is reported in one line."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from raywgen.compat import job_client
from raywgen.ray_address import ClusterError, check_address, check_port, check_token_file, refused_token

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient
    from requests import Response

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_ENVIRONMENT = "RAY_API_SERVER_ADDRESS"
_PAUSES = (0.5, 1.0, 2.0, 4.0)
"""Seconds between the attempts of a request that may be repeated."""
_Answer = TypeVar("_Answer")


def connect(address: str | None = None) -> JobSubmissionClient:
    """Connects to the job server of a cluster.

    The client asks again where the connection is dropped, as busy dashboards and forwarded ports do, unless the request
    changes something on the cluster.

    Args:
        address: Address of the dashboard (`http://...`) or of the head node. None takes `RAY_API_SERVER_ADDRESS` or
            `RAY_ADDRESS`, as `ray job` does, or else the dashboard of this machine.

    Raises:
        ClusterError: Nobody answers there, the answer is not Ray's, or the token is refused.
    """
    from ray.exceptions import AuthenticationError

    check_token_file()
    target = address or os.environ.get(_ENVIRONMENT) or os.environ.get("RAY_ADDRESS") or DEFAULT_ADDRESS
    if target.startswith(("http://", "https://")):
        check_port(target)
    else:
        check_address(target)
    before = os.environ.get(_ENVIRONMENT)
    os.environ[_ENVIRONMENT] = target  # Ray lets this variable overrule the argument.
    try:
        return job_client(target, lambda method, send: _request(target, method, send))
    except ClusterError:
        raise
    except AuthenticationError as error:
        raise refused_token(target) from error
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ClusterError(
            f"the answer at {target} is not that of a Ray job server ({reason}); is it the dashboard's port?"
        ) from error
    finally:
        if before is None:
            del os.environ[_ENVIRONMENT]
        else:
            os.environ[_ENVIRONMENT] = before


def patiently(target: str, ask: Callable[[], _Answer], *dropped: type[Exception]) -> _Answer:
    """Asks a dashboard something that changes nothing, and asks again after a dropped connection.

    Args:
        target: Address of the dashboard, for the message.
        ask: Sends the request and returns the answer.
        dropped: What `ask` raises where the connection is dropped.

    Raises:
        ClusterError: Each attempt was dropped.
    """
    for pause in _PAUSES:
        try:
            return ask()
        except dropped:
            time.sleep(pause)
    try:
        return ask()
    except dropped as error:
        raise ClusterError(
            f"the dashboard at {target} dropped {len(_PAUSES) + 1} connections in a row ({_reason(error)}): jobs on "
            "the cluster go on; give the command again when it answers"
        ) from error


def _request(target: str, method: str, send: Callable[[], Response]) -> Response:
    from requests import ConnectionError as Dropped
    from requests import Timeout

    if method == "GET":
        return patiently(target, send, Dropped, Timeout)
    try:
        return send()
    except (Dropped, Timeout) as error:
        raise ClusterError(
            f"the connection to {target} was dropped before an answer came ({_reason(error)}): `raywgen job list` "
            "shows whether the request was carried out; if not, give the command again"
        ) from error


def _reason(error: BaseException) -> str:
    """Returns the innermost message, such as that of the system's own error."""
    while error.args and isinstance(error.args[-1], BaseException):
        error = error.args[-1]
    lines = str(error.args[-1] if error.args else "").strip().splitlines()
    return lines[0] if lines else type(error).__name__
