"""The shipped files of cluster/: against the schemas of those who read them, and against the versions tested here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

from raywgen.cluster.preflight import train_config
from raywgen.cluster.render import render, requirements
from raywgen.cluster.settings import RenderConfig
from raywgen.training.resource_check import GROUP_LABEL, read_group

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((Path(__file__).parent / "schemas" / "kuberay.json").read_text())
CONFIG = "configs/igpg/digits.yaml"
OVERRIDES = ["num_workers=4", "zero_stage=2"]


def shipped(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster" / name).read_text())


def refusals(kind: str, manifest: Any) -> list[str]:
    schema = SCHEMA | {"$ref": f"#/$defs/{kind}"}
    validator = jsonschema.Draft202012Validator(schema)
    return [error.message for error in validator.iter_errors(manifest)]


def specs() -> list[dict[str, Any]]:
    return [shipped("raycluster.yaml")["spec"], shipped("rayjob.yaml")["spec"]["rayClusterSpec"]]


def pods() -> list[dict[str, Any]]:
    groups = [group for spec in specs() for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]
    return [group["template"]["spec"] for group in groups]


def containers() -> list[dict[str, Any]]:
    return [container for pod in pods() for container in pod["containers"]]


def test_shipped_files_are_what_render_writes() -> None:
    files = render(train_config([CONFIG, *OVERRIDES], ROOT), RenderConfig(), CONFIG, OVERRIDES)
    assert {path.name for path in (ROOT / "cluster").iterdir()} == files.keys()
    for name, text in files.items():
        command = f"raywgen cluster render {CONFIG} {' '.join(OVERRIDES)} --into cluster"
        assert (ROOT / "cluster" / name).read_text() == text, f"write it again: {command}"


@pytest.mark.parametrize(("name", "kind"), [("raycluster.yaml", "RayCluster"), ("rayjob.yaml", "RayJob")])
def test_kuberay_takes_them(name: str, kind: str) -> None:
    assert refusals(kind, shipped(name)) == []


def test_the_schema_refuses_what_kuberay_would() -> None:
    manifest = shipped("raycluster.yaml")
    del manifest["spec"]["workerGroupSpecs"][0]["maxReplicas"]
    manifest["spec"]["authOptions"]["mode"] = "tokens"
    manifest["spec"]["headGroupSpec"]["template"]["spec"]["container"] = []
    assert len(refusals("RayCluster", manifest)) == 3


@pytest.mark.parametrize("name", ["onprem.yaml", "aws.yaml"])
def test_the_launcher_takes_them(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(shipped(name))  # As `ray up` does.
    validate_config(prepared)
    kinds = prepared["available_node_types"]
    assert sum(kind.get("min_workers", 0) for kind in kinds.values()) <= prepared["max_workers"]
    broken = shipped(name) | {"worker_commands": []}
    with pytest.raises(jsonschema.ValidationError, match="worker_commands"):
        validate_config(prepare_config(broken))


def test_versions_are_those_of_the_lock() -> None:
    lock = (ROOT / "configs" / "constraints.txt").read_text()
    (version,) = re.findall(r"^ray==(\S+)$", lock, re.MULTILINE)
    assert version == ray.__version__, "the manifests name the version that the tests run"
    assert {spec["rayVersion"] for spec in specs()} == {version}
    launched = [shipped("onprem.yaml")["docker"], shipped("aws.yaml")["docker"]]
    images = [container["image"] for container in containers()] + [docker["image"] for docker in launched]
    assert all(re.fullmatch(rf"rayproject/ray:{re.escape(version)}-py311-(cpu|gpu)", image) for image in images)


def test_containers_are_limited_and_without_privileges() -> None:
    assert all(pod["securityContext"]["runAsNonRoot"] is True for pod in pods())
    for container in containers():
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def test_health_is_left_to_the_operator() -> None:
    # Probes of one's own would replace KubeRay's, which know of the token and of the autoscaler.
    assert not any(container.keys() & {"livenessProbe", "readinessProbe"} for container in containers())


def test_every_node_mounts_the_shared_storage() -> None:
    claim = shipped("storage.yaml")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in pods():
        assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert all(container["volumeMounts"][0]["mountPath"] == "/mnt/raywgen" for container in pod["containers"])
    for name in ("onprem.yaml", "aws.yaml"):
        assert "-v /mnt/raywgen:/mnt/raywgen" in shipped(name)["docker"]["run_options"]


def test_no_secret_stands_in_a_file() -> None:
    assert all(spec["authOptions"] == {"mode": "token"} for spec in specs())
    assert all("env" not in container for container in containers())
    for name in ("onprem.yaml", "aws.yaml"):
        config = shipped(name)
        assert config["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
        starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
        assert all(start == "ray stop" or start.startswith("RAY_AUTH_MODE=token ray start") for start in starts)


def test_groups_scale_within_bounds_that_the_head_tells() -> None:
    for spec in specs():
        assert spec["enableInTreeAutoscaling"] is True
        labels = spec["headGroupSpec"]["labels"]
        for group in spec["workerGroupSpecs"]:
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
            most, has = read_group(labels[f"{GROUP_LABEL}{group['groupName']}"])
            limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
            assert (most, has["CPU"]) == (group["maxReplicas"], float(limits["cpu"]))
            assert has.get("GPU", 0) == float(limits.get("nvidia.com/gpu", 0))


def test_jobs_install_what_the_project_declares() -> None:
    assert shipped("runtime_env.yaml")["pip"] == requirements()
    environment = yaml.safe_load(shipped("rayjob.yaml")["spec"]["runtimeEnvYAML"])
    assert environment == {"pip": requirements(), "working_dir": "local:///mnt/raywgen/code"}
    assert {"deepspeed", "torch", "typer"} <= {line.partition(">=")[0] for line in requirements()}
    assert not any(line.startswith(("ray", "numpy", "pyarrow")) for line in requirements())


def test_a_job_names_a_script_and_config_that_are_there() -> None:
    python, script, config, *_ = shipped("rayjob.yaml")["spec"]["entrypoint"].split()
    assert python == "python"
    assert (ROOT / script).is_file()
    assert (ROOT / config).is_file()
