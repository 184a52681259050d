"""Renders manifests and launcher files that fit a run: room for its workers, one version of Ray, shared paths."""

from __future__ import annotations

import posixpath
import re
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import yaml

from raywgen.cluster.kuberay import ray_cluster, ray_job, storage_claim
from raywgen.cluster.launcher import aws, on_premise
from raywgen.cluster.network import network_policies
from raywgen.cluster.settings import RenderConfig
from raywgen.json_types import JsonObject
from raywgen.ray_address import ClusterError
from raywgen.training import TrainConfig
from raywgen.training.resource_check import Nodes, check_run

_PROJECT = Path(__file__).parents[2] / "pyproject.toml"
"""The project file, which exists if the package is used from a clone."""
_IN_THE_IMAGE = {"ray", "pyarrow", "numpy"}
_HEADERS: dict[str, list[str]] = {
    "storage.yaml": ["Storage that every node sees: corpora, run folders and, for RayJobs, the code."],
    "network.yaml": [
        "The cluster's own pods may reach every port; pods of namespace {namespace} and KubeRay's operator may reach",
        "the dashboard. Its pods may reach one another, DNS, and TCP ports {egress_ports} outside, but not the address",
        "at which clouds give a machine's credentials. The network plugin must enforce policies for this to hold.",
    ],
    "raycluster.yaml": [
        "A Ray cluster for raywgen on Kubernetes, with KubeRay 1.6 or newer, which adds readiness and liveness probes:",
        "  kubectl apply -n {namespace} -f storage.yaml -f network.yaml -f raycluster.yaml",
        "  kubectl port-forward -n {namespace} service/{name}-head-svc 8265",
        "  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(kubectl get secret -n {namespace} {secret} "
        "-o jsonpath='{{.data.auth_token}}' | base64 -d)",
        "  raywgen job submit --runtime-env runtime_env.yaml {arguments}",
    ],
    "rayjob.yaml": [
        "A training run with a cluster of its own, which is removed when the run ends. The code lies at {code},",
        "for instance by `kubectl cp . POD:/mnt/raywgen/code` through any pod that mounts the storage:",
        "  kubectl apply -n {namespace} -f storage.yaml -f network.yaml",
        "  kubectl create -n {namespace} -f rayjob.yaml",
        "Created again after a failure or a stop, it resumes from the last checkpoint of `out`.",
    ],
    "runtime_env.yaml": [
        "Packages that the stock Ray images lack; raywgen itself is sent as the job's working directory."
    ],
    "onprem.yaml": [
        "A Ray cluster on machines of your own, all of which mount {mount} and hold docker:",
        "  ray get-auth-token --generate && ray up -y onprem.yaml && ray dashboard onprem.yaml",
        "  RAY_AUTH_MODE=token raywgen job submit --runtime-env runtime_env.yaml {arguments}",
        "  ray down -y onprem.yaml",
    ],
    "aws.yaml": [
        "A Ray cluster on AWS, with {mount} on the EFS file system of `initialization_commands`:",
        "  ray get-auth-token --generate && ray up -y aws.yaml && ray dashboard aws.yaml",
        "  RAY_AUTH_MODE=token raywgen job submit --runtime-env runtime_env.yaml {arguments}",
        "  ray down -y aws.yaml",
    ],
}


def render(
    run: TrainConfig, cluster: RenderConfig, config: str | None = None, overrides: Sequence[str] = ()
) -> dict[str, str]:
    """Returns the text of each file by its name.

    Args:
        run: Config of the training run.
        cluster: Settings of the cluster.
        config: The run's YAML file, relative to the working directory of jobs.
        overrides: The run's `key=value` overrides.

    Raises:
        ClusterError: The largest cluster has no room for the run's workers, a path is not on shared storage, or
            nothing gives access to object storage.
    """
    _check(run, cluster, config)
    arguments = _arguments(run, cluster, config, overrides)
    entrypoint = f"python jobs/train.py {arguments}"
    environment: JsonObject = {"pip": requirements()}
    files: dict[str, JsonObject] = {
        "storage.yaml": storage_claim(cluster),
        "network.yaml": network_policies(cluster),
        "raycluster.yaml": ray_cluster(cluster),
        "rayjob.yaml": ray_job(cluster, entrypoint, _dump(environment | {"working_dir": cluster.code})),
        "runtime_env.yaml": environment,
        "onprem.yaml": on_premise(cluster),
        "aws.yaml": aws(cluster),
    }
    values = vars(cluster) | {
        "arguments": f"train {arguments}",
        "secret": cluster.token_secret or cluster.name,
        "egress_ports": ", ".join(map(str, cluster.egress_ports)),
    }
    return {name: _header(name, values) + _dump(content) for name, content in files.items()}


def requirements() -> list[str]:
    """Returns the dependencies that the project declares and Ray's images do not hold."""
    if _PROJECT.is_file():
        declared = tomllib.loads(_PROJECT.read_text())["project"]["dependencies"]
    else:
        declared = [line for line in metadata.requires("raywgen") or [] if "extra ==" not in line]
    return [line for line in declared if re.split(r"[\[<>=!~ ]", line)[0] not in _IN_THE_IMAGE]


def _check(run: TrainConfig, cluster: RenderConfig, config: str | None) -> None:
    most = [has for count, has in cluster.groups.values() for _ in range(count)]
    if run.max_workers > 0:
        try:
            check_run(run, Nodes(alive=[], most=most))
        except ClusterError as error:
            key = "cluster.max_gpu_nodes" if run.device == "cuda" else "cluster.max_nodes"
            raise ClusterError(f"{error} by {key}") from error
    if config is not None and (Path(config).is_absolute() or ".." in Path(config).parts):
        raise ClusterError(f"{config}: name the config relative to the clone, which is what the cluster gets")
    if run.corpus.startswith("s3://") and not (cluster.s3_secret or cluster.service_account):
        raise ClusterError(
            f"corpus={run.corpus} needs credentials on every node: give cluster.s3_secret, a Kubernetes secret with "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or cluster.service_account"
        )


def _arguments(run: TrainConfig, cluster: RenderConfig, config: str | None, overrides: Sequence[str]) -> str:
    """Returns the arguments of the run, with paths that all nodes share."""
    rest = [override for override in overrides if not override.startswith(("corpus=", "out="))]
    paths = [f"corpus={_shared(run.corpus, 'corpus', cluster)}", f"out={_shared(run.out, 'out', cluster)}"]
    return shlex.join([*([config] if config else []), *paths, *rest])


def _shared(path: str, key: str, cluster: RenderConfig) -> str:
    if "://" in path or path.startswith(f"{cluster.mount}/"):
        return path
    if path.startswith("/"):
        raise ClusterError(f"{key}={path} lies on no storage that nodes share; give a path under {cluster.mount}")
    return posixpath.join(cluster.mount, path)


def _header(name: str, values: Mapping[str, object]) -> str:
    written = "Written by `raywgen cluster render`, which fills it for another run."
    return "".join(f"# {line.format(**values)}\n" for line in [*_HEADERS[name], written])


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks, and never refers to a value by an anchor."""

    def ignore_aliases(self, data: object) -> bool:
        """Writes each use out, so that an edit of one pod changes that pod only."""
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Writes a text of several lines as a block."""
        return self.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _Dumper.represent_text)


def _dump(content: Mapping[str, object]) -> str:
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=1000)
