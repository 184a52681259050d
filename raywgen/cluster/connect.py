"""Connects to a cluster's job server; a missing server or a wrong token is reported in one line."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from raywgen.ray_address import ClusterError, check_address, check_port, check_token_file, refused_token

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_ENVIRONMENT = "RAY_API_SERVER_ADDRESS"


def connect(address: str | None = None) -> JobSubmissionClient:
    """Connects to the job server of a cluster.

    Args:
        address: Address of the dashboard (`http://...`) or of the head node. None takes `RAY_API_SERVER_ADDRESS` or
            `RAY_ADDRESS`, as `ray job` does, or else the dashboard of this machine.

    Raises:
        ClusterError: Nobody answers there, the answer is not Ray's, or the token is refused.
    """
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    check_token_file()
    target = address or os.environ.get(_ENVIRONMENT) or os.environ.get("RAY_ADDRESS") or DEFAULT_ADDRESS
    if target.startswith(("http://", "https://")):
        check_port(target)
    else:
        check_address(target)
    before = os.environ.get(_ENVIRONMENT)
    os.environ[_ENVIRONMENT] = target  # Ray lets this variable overrule the argument.
    try:
        return JobSubmissionClient(target)
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
