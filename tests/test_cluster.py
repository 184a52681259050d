from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
# In the stock Ray images, as Ray's own dependencies.
IN_THE_IMAGE = {"ray[default,train,tune,data]", "pyarrow", "numpy"}


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / "cluster" / name).read_text()))


def pods(spec: dict[str, Any]) -> list[dict[str, Any]]:
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    (found,) = [document for document in documents("raycluster.yaml") if document["kind"] == "RayCluster"]
    return found["spec"]


def declared() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {line for line in project["dependencies"] if line.partition(">=")[0] not in IN_THE_IMAGE}


def test_images_are_of_the_version_the_cluster_says(cluster: dict[str, Any]) -> None:
    for pod in pods(cluster):
        for container in pod["containers"]:
            assert container["image"].startswith(f"rayproject/ray:{cluster['rayVersion']}-")


def test_containers_are_limited_and_without_privileges(cluster: dict[str, Any]) -> None:
    for pod in pods(cluster):
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
            assert container["securityContext"]["allowPrivilegeEscalation"] is False


def test_every_node_mounts_the_shared_storage(cluster: dict[str, Any]) -> None:
    (claim,) = [document for document in documents("raycluster.yaml") if document["kind"] == "PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in pods(cluster):
        assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert all(container["volumeMounts"][0]["mountPath"] == "/mnt/raywgen" for container in pod["containers"])


def test_the_token_is_a_secret_of_the_operator(cluster: dict[str, Any]) -> None:
    assert cluster["authOptions"] == {"mode": "token"}
    assert all("env" not in container for pod in pods(cluster) for container in pod["containers"])


def test_groups_scale_within_their_bounds(cluster: dict[str, Any]) -> None:
    assert cluster["enableInTreeAutoscaling"] is True
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_jobs_install_what_the_project_declares() -> None:
    (environment,) = documents("runtime_env.yaml")
    assert set(environment["pip"]) == declared()
    (job,) = documents("rayjob.yaml")
    assert set(yaml.safe_load(job["spec"]["runtimeEnvYAML"])["pip"]) == declared()


def test_a_job_names_a_script_and_config_that_are_there() -> None:
    (job,) = documents("rayjob.yaml")
    (found,) = [document for document in documents("raycluster.yaml") if document["kind"] == "RayCluster"]
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": found["metadata"]["name"]}
    _, script, config, *_ = job["spec"]["entrypoint"].split()
    for path in (script, config):
        assert (ROOT / Path(path).relative_to("/mnt/raywgen/code")).is_file()
