"""A client of a cluster's job server, refused in one line where there is none or the token is wrong."""

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
        address: Of the dashboard (`http://...`) or of the head node; else that of `RAY_API_SERVER_ADDRESS` or
            `RAY_ADDRESS`, as for `ray job`, else the dashboard of this machine.

    Raises:
        ClusterError: Nobody answers there, what answers is no Ray, or the token is refused.
    """
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    check_token_file()
    asked = address or os.environ.get(_ENVIRONMENT) or os.environ.get("RAY_ADDRESS") or DEFAULT_ADDRESS
    if asked.startswith(("http://", "https://")):
        check_port(asked)
    else:
        check_address(asked)
    before = os.environ.get(_ENVIRONMENT)
    os.environ[_ENVIRONMENT] = asked  # Ray lets this variable overrule the argument.
    try:
        return JobSubmissionClient(asked)
    except AuthenticationError as error:
        raise refused_token(asked) from error
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ClusterError(
            f"what answers at {asked} is no job server of Ray ({reason}); is it the dashboard's port?"
        ) from error
    finally:
        if before is None:
            del os.environ[_ENVIRONMENT]
        else:
            os.environ[_ENVIRONMENT] = before
