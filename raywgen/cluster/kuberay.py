"""KubeRay's RayCluster and RayJob, and the storage they share."""

from __future__ import annotations

from typing import Any

from raywgen.cluster.network import CLUSTER_LABEL, job_clusters
from raywgen.cluster.preflight import STORAGE_LABEL
from raywgen.cluster.settings import RenderConfig
from raywgen.training.resource_check import GROUP_LABEL, write_group

# The user and group `ray` of the stock images.
_USER = {"runAsNonRoot": True, "runAsUser": 1000, "runAsGroup": 100, "fsGroup": 100}
_PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10001}
_VOLUME = "shared"
_SECONDS_TO_START = 1800
_HEAD = {"cpu": "2", "memory": "8Gi"}
_CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


def storage_claim(cluster: RenderConfig) -> dict[str, Any]:
    """A claim that every node may write to: they read the corpus, and write their part of a run folder."""
    spec: dict[str, Any] = {
        "accessModes": ["ReadWriteMany"],
        "resources": {"requests": {"storage": cluster.storage_size}},
    }
    if cluster.storage_class:
        spec["storageClassName"] = cluster.storage_class
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": _metadata(cluster), "spec": spec}


def ray_cluster(cluster: RenderConfig) -> dict[str, Any]:
    """A cluster that stays until it is deleted."""
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": _metadata(cluster),
        "spec": _cluster_spec(cluster, cluster.name),
    }


def ray_job(cluster: RenderConfig, entrypoint: str, runtime_env: str) -> dict[str, Any]:
    """A run on a cluster of its own; a retry makes a new one, and goes on from the last checkpoint."""
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"generateName": f"{cluster.name}-train-", "namespace": cluster.namespace},
        "spec": {
            "entrypoint": entrypoint,
            "runtimeEnvYAML": runtime_env,
            "backoffLimit": 2,
            "preRunningDeadlineSeconds": _SECONDS_TO_START,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": cluster.idle_seconds,
            "rayClusterSpec": _cluster_spec(cluster, job_clusters(cluster)),
        },
    }


def head_labels(cluster: RenderConfig) -> dict[str, str]:
    """Records what the autoscaler may add and where credentials come from, for a job's preflight to read."""
    labels = {f"{GROUP_LABEL}{name}": write_group(most, has) for name, (most, has) in cluster.groups.items() if most}
    if access := cluster.s3_secret or cluster.service_account:
        labels[STORAGE_LABEL] = access
    return labels


def _metadata(cluster: RenderConfig) -> dict[str, str]:
    return {"name": cluster.name, "namespace": cluster.namespace}


def _cluster_spec(cluster: RenderConfig, name: str) -> dict[str, Any]:
    cpus = {"cpu": str(cluster.cpus)}
    groups = [_group(cluster, "cpu", cluster.min_nodes, cpus | {"memory": cluster.memory})]
    if cluster.max_gpu_nodes:
        has = cpus | {"memory": cluster.gpu_memory, "nvidia.com/gpu": str(cluster.gpus)}
        groups.append(_group(cluster, "gpu", 0, has))
    head = _pod(cluster, "ray-head", cluster.image_of("cpu"), dict(_HEAD))
    for template in (head, *(group["template"] for group in groups)):
        template["metadata"] = {"labels": {CLUSTER_LABEL: name}}
    return {
        "rayVersion": cluster.ray_version,
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {"idleTimeoutSeconds": cluster.idle_seconds},
        "authOptions": {"mode": "token"} | ({"secretName": cluster.token_secret} if cluster.token_secret else {}),
        "headGroupSpec": {
            "rayStartParams": {"num-cpus": "0"},  # The head schedules; it trains nothing.
            "labels": head_labels(cluster),
            "template": head,
        },
        "workerGroupSpecs": groups,
    }


def _group(cluster: RenderConfig, kind: str, least: int, has: dict[str, str]) -> dict[str, Any]:
    return {
        "groupName": kind,
        "replicas": least,
        "minReplicas": least,
        "maxReplicas": cluster.groups[kind][0],
        "rayStartParams": {},
        "template": _pod(cluster, "ray-worker", cluster.image_of(kind), has),
    }


def _pod(cluster: RenderConfig, name: str, image: str, has: dict[str, str]) -> dict[str, Any]:
    container: dict[str, Any] = {
        "name": name,
        "image": image,
        "resources": {"requests": dict(has), "limits": dict(has)},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [{"name": _VOLUME, "mountPath": cluster.mount}],
    }
    if name == "ray-head":
        container["ports"] = [{"name": port, "containerPort": number} for port, number in _PORTS.items()]
    if cluster.s3_secret:
        container["env"] = [
            {"name": key, "valueFrom": {"secretKeyRef": {"name": cluster.s3_secret, "key": key}}}
            for key in _CREDENTIALS
        ]
    spec: dict[str, Any] = {"securityContext": dict(_USER)}
    if cluster.service_account:
        spec["serviceAccountName"] = cluster.service_account
    if "nvidia.com/gpu" in has:
        spec["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    spec["containers"] = [container]
    spec["volumes"] = [{"name": _VOLUME, "persistentVolumeClaim": {"claimName": cluster.name}}]
    return {"spec": spec}
