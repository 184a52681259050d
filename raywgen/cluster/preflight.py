"""Checks before the upload whether a job would fail or wait for ever."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raywgen.cluster.connect import patiently
from raywgen.compat import dashboard_node_types
from raywgen.config import given_once
from raywgen.ray_address import ClusterError
from raywgen.training import TrainConfig, load_train_config
from raywgen.training.resource_check import GROUP_LABEL, Resources, check_request, check_run, most_nodes
from raywgen.trust import beside

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

STORAGE_LABEL = "raywgen/s3"
"""Label of a head node that names the secret or service account by which its nodes reach object storage."""


def train_config(arguments: Sequence[str], working_dir: str | Path) -> TrainConfig:
    """Returns the config that `jobs/train.py` would make of its arguments.

    Raises:
        ConfigError: The arguments are wrong; the message is the one that the job would give.
    """
    given = [argument for argument in arguments if not argument.startswith("-")]
    name = None if not given or "=" in given[0] else given[0]
    with beside(str(working_dir)):  # A generator of the user's own may lie in the folder that is sent.
        return load_train_config(name, given_once(given if name is None else given[1:]), working_dir)


def check_job(client: JobSubmissionClient, job: str, arguments: Sequence[str], working_dir: str | Path) -> None:
    """Refuses a job that the cluster could not run.

    Raises:
        ConfigError: A training run's settings are wrong.
        ClusterError: The cluster has no room for its workers, or no access to its object storage.
    """
    alive = _alive(client)
    if not alive:
        raise ClusterError(f"the cluster at {client.get_address()} has no node yet; try again once it has")
    nodes = most_nodes(alive, lambda: iter([dashboard_node_types(client)]))
    if job == "train":
        config = train_config(arguments, working_dir)
        if config.max_workers > 0:
            check_run(config, nodes)
    else:
        check_request({"CPU": 1.0}, f"jobs/{job}.py", nodes)
    _check_storage(arguments, [labels for _, labels in alive])


def _alive(client: JobSubmissionClient) -> list[tuple[Resources, Mapping[str, str]]]:
    from ray.util.state import list_nodes
    from ray.util.state.exception import ServerUnavailable

    target = client.get_address()
    ask = partial(list_nodes, address=target, filters=[("state", "=", "ALIVE")], limit=10_000)
    nodes: list[Any] = patiently(target, ask, ServerUnavailable)
    return [(node.resources_total, node.labels or {}) for node in nodes]


def _check_storage(arguments: Sequence[str], labels: Sequence[Mapping[str, str]]) -> None:
    remote = next((argument for argument in arguments if "=s3://" in argument or argument.startswith("s3://")), None)
    rendered = any(label.startswith(GROUP_LABEL) for of_node in labels for label in of_node)
    if remote and rendered and not any(STORAGE_LABEL in of_node for of_node in labels):
        raise ClusterError(
            f"{remote}: the cluster's nodes hold no credentials for object storage; render it with cluster.s3_secret "
            "(a Kubernetes secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY) or cluster.service_account"
        )
