"""Submits jobs as `ray job submit --working-dir . -- python jobs/X.py ...` does, after checking them."""

from __future__ import annotations

import asyncio
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from raywgen.cluster.outgoing import check_outgoing
from raywgen.cluster.working_dir import check_working_dir
from raywgen.config import ConfigError
from raywgen.inputs import read_yaml_text
from raywgen.names import nearest
from raywgen.ray_address import ClusterError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

OUT = "raywgen.out"
"""Key of the run folder in a job's metadata."""

_STOP_SECONDS = 30.0
_AGAIN_SECONDS = 1.0
_SERVER_FAULT = 500
_UNKNOWN = "status code 404"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One of the scripts of `jobs/` with its arguments.

    Attributes:
        name: Name of the script, such as `train`.
        arguments: Arguments of the script.
        working_dir: The folder that is sent to every node; the script lies in its `jobs/`.
        runtime_env: YAML file of packages that nodes have to install first; None if they have them all.
        send: Files, environment variables and keys of arguments to send although they look like secrets.
    """

    name: str
    arguments: Sequence[str] = field(default_factory=list)
    working_dir: str = "."
    runtime_env: str | None = None
    send: Sequence[str] = field(default_factory=list)

    def entrypoint(self) -> str:
        """Returns the command that runs on the cluster."""
        return shlex.join(["python", f"jobs/{self.name}.py", *self.arguments])


@dataclass(frozen=True, slots=True)
class Submitted:
    """A job that was sent.

    Attributes:
        id: Id of the job.
        left_out: Files of the working directory that were not sent, because their names are typical of secrets.
    """

    id: str
    left_out: list[str]


def submit(client: JobSubmissionClient, job: Job) -> Submitted:
    """Checks a job and sends it.

    Raises:
        ClusterError: There is no such script, the working directory is too large, a secret would be sent, or the
            cluster has no room.
        ConfigError: A training run's settings are wrong.
    """
    from raywgen.cluster.preflight import check_job  # Imported late, because it imports torch.

    _check_script(job)
    environment = _environment(job.runtime_env)
    check_working_dir(job.working_dir, excludes=environment.get("excludes") or [])
    outgoing = check_outgoing(job.working_dir, environment, job.arguments, job.send)
    check_job(client, job.name, job.arguments, job.working_dir)
    environment |= {"working_dir": job.working_dir, "excludes": outgoing.excludes}
    try:
        job_id = client.submit_job(entrypoint=job.entrypoint(), runtime_env=environment, metadata=_metadata(job))
    except (ClusterError, ConfigError, AssertionError):
        raise
    except Exception as error:  # Ray raises the server's answer, with the server's traceback.
        reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
        raise ClusterError(
            f"the cluster did not take the job ({reason.strip()}); mend that and submit it again"
        ) from error
    return Submitted(job_id, outgoing.left_out)


def follow(client: JobSubmissionClient, job_id: str, write: Callable[[str], None]) -> str:
    """Passes a job's log on as it grows, and returns the final state.

    A forwarded port drops connections that are idle, and a busy dashboard any: the log is then taken up where it was.

    Raises:
        ClusterError: The cluster has no log of such a job, or does not answer any more.
    """
    log = _Log(write)
    while True:
        asyncio.run(log.tail(client, job_id))
        if (status := find(client, job_id).status).is_terminal():
            return str(status)
        time.sleep(_AGAIN_SECONDS)


class _Log:
    """A job's log, of which each character is passed on once, however often it is read from its beginning."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._num_written = 0

    async def tail(self, client: JobSubmissionClient, job_id: str) -> None:
        """Reads the log until it ends or the connection does."""
        from aiohttp import ClientError, ClientResponseError

        end = 0
        arriving = aiter(client.tail_job_logs(job_id))
        while True:
            try:
                lines = await anext(arriving)
            except ClientResponseError as error:
                if error.status < _SERVER_FAULT:
                    raise ClusterError(f"the cluster has no log of job '{job_id}' ({error.message})") from error
                return
            except (StopAsyncIteration, ClientError, TimeoutError, RuntimeError):  # Ray raises RuntimeError itself.
                return
            end += len(lines)
            if num_new := max(end - self._num_written, 0):
                self._write(lines[-num_new:])
                self._num_written = end


def stop(client: JobSubmissionClient, job_id: str) -> str:
    """Stops a job and waits for its end; its training up to the last checkpoint is kept.

    Returns:
        The final state of the job, which is unchanged if it had ended before.
    """
    find(client, job_id)
    client.stop_job(job_id)
    deadline = time.monotonic() + _STOP_SECONDS
    while not (status := client.get_job_status(job_id)).is_terminal() and time.monotonic() < deadline:
        time.sleep(0.5)
    return str(status)


def find(client: JobSubmissionClient, job_id: str) -> JobDetails:
    """Returns the details of a job.

    Raises:
        ClusterError: The cluster knows no such job.
    """
    try:
        return client.get_job_info(job_id)
    except ClusterError:
        raise
    except RuntimeError as error:
        if _UNKNOWN not in str(error):
            raise ClusterError(
                f"the cluster did not tell about job '{job_id}' ({str(error).strip().splitlines()[0]})"
            ) from error
        raise ClusterError(f"the cluster knows no job '{job_id}'; `raywgen job list` names those it knows") from error


def _check_script(job: Job) -> None:
    folder = Path(job.working_dir) / "jobs"
    if not (folder / f"{job.name}.py").is_file():
        names = sorted(path.stem for path in folder.glob("*.py"))
        known = ", ".join(names) or "none: give --working-dir"
        near = f"; did you mean '{nearest(job.name, names)}'?" if names else ""
        raise ClusterError(f"{folder} has no {job.name}.py; jobs there: {known}{near}")


def _environment(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    if not Path(path).is_file():
        raise ClusterError(f"runtime environment {path} does not exist; the shipped one is cluster/runtime_env.yaml")
    try:
        content = yaml.safe_load(read_yaml_text(path))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ClusterError(
            f"runtime environment {path} is no YAML ({error}); cluster/runtime_env.yaml is one"
        ) from error
    if not isinstance(content, dict):
        raise ClusterError(f"runtime environment {path} must hold `key: value` lines, such as cluster/runtime_env.yaml")
    return content


def _metadata(job: Job) -> dict[str, str]:
    metadata = {"raywgen.job": job.name}
    if job.name == "train":
        from raywgen.cluster.preflight import train_config

        return metadata | {OUT: train_config(job.arguments, job.working_dir).out}
    given = [argument.removeprefix("out=") for argument in job.arguments if argument.startswith("out=")]
    return metadata | ({OUT: given[-1]} if given else {})
