"""Manifests of KubeRay's RayCluster and RayJob, and of the storage that they share."""

from __future__ import annotations

from raywgen.cluster.network import CLUSTER_LABEL, job_clusters
from raywgen.cluster.preflight import STORAGE_LABEL
from raywgen.cluster.settings import RenderConfig
from raywgen.json_types import JsonObject
from raywgen.training.resource_check import GROUP_LABEL, write_group

# The user and group `ray` of the stock images.
_USER = {"runAsNonRoot": True, "runAsUser": 1000, "runAsGroup": 100, "fsGroup": 100}
_PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10001}
_VOLUME = "shared"
_SECONDS_TO_START = 1800
_HEAD = {"cpu": "2", "memory": "8Gi"}
_CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


def storage_claim(cluster: RenderConfig) -> JsonObject:
    """Returns a storage claim that every node may write to, for corpora and run folders."""
    spec: JsonObject = {
        "accessModes": ["ReadWriteMany"],
        "resources": {"requests": {"storage": cluster.storage_size}},
    }
    if cluster.storage_class:
        spec["storageClassName"] = cluster.storage_class
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": _metadata(cluster), "spec": spec}


def ray_cluster(cluster: RenderConfig) -> JsonObject:
    """Returns a RayCluster, which stays until it is deleted."""
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": _metadata(cluster),
        "spec": _cluster_spec(cluster, cluster.name),
    }


def ray_job(cluster: RenderConfig, entrypoint: str, runtime_env: str) -> JsonObject:
    """Returns a RayJob: a run on a cluster of its own. A retry starts a new cluster and resumes from a checkpoint."""
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
    """Returns labels that say what the autoscaler may add and where credentials come from, for a job's preflight."""
    labels = {f"{GROUP_LABEL}{name}": write_group(most, has) for name, (most, has) in cluster.groups.items() if most}
    if access := cluster.s3_secret or cluster.service_account:
        labels[STORAGE_LABEL] = access
    return labels


def _metadata(cluster: RenderConfig) -> dict[str, str]:
    return {"name": cluster.name, "namespace": cluster.namespace}


def _cluster_spec(cluster: RenderConfig, name: str) -> JsonObject:
    cpus = {"cpu": str(cluster.cpus)}
    groups = [_group(cluster, name, "cpu", cluster.min_nodes, cpus | {"memory": cluster.memory})]
    if cluster.max_gpu_nodes:
        has = cpus | {"memory": cluster.gpu_memory, "nvidia.com/gpu": str(cluster.gpus)}
        groups.append(_group(cluster, name, "gpu", 0, has))
    head = _pod(cluster, name, "ray-head", cluster.image_of("cpu"), dict(_HEAD))
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


def _group(cluster: RenderConfig, cluster_name: str, kind: str, least: int, has: dict[str, str]) -> JsonObject:
    return {
        "groupName": kind,
        "replicas": least,
        "minReplicas": least,
        "maxReplicas": cluster.groups[kind][0],
        "rayStartParams": {},
        "template": _pod(cluster, cluster_name, "ray-worker", cluster.image_of(kind), has),
    }


def _pod(cluster: RenderConfig, cluster_name: str, name: str, image: str, has: dict[str, str]) -> JsonObject:
    container: JsonObject = {
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
    spec: JsonObject = {"securityContext": dict(_USER)}
    if cluster.service_account:
        spec["serviceAccountName"] = cluster.service_account
    if "nvidia.com/gpu" in has:
        spec["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    spec["containers"] = [container]
    spec["volumes"] = [{"name": _VOLUME, "persistentVolumeClaim": {"claimName": cluster.name}}]
    return {"spec": spec, "metadata": {"labels": {CLUSTER_LABEL: cluster_name}}}
