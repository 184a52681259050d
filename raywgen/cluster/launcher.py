"""Files for Ray's own cluster launcher (`ray up`), for machines of your own and for machines of a cloud."""

from __future__ import annotations

from raywgen.cluster.kuberay import head_labels
from raywgen.cluster.settings import RenderConfig
from raywgen.json_types import JsonObject
from raywgen.training.resource_check import GROUP_LABEL, write_group

# The launcher copies the token file here, in the home of the image's user, so that no shared file holds the token.
_TOKEN = "/home/ray/.ray/auth_token"
_HEAD_TYPE = "m7i.large"


def on_premise(cluster: RenderConfig) -> JsonObject:
    """Describes a cluster of machines with fixed addresses, on which the launcher starts Ray over ssh."""
    num_nodes = len(cluster.worker_ips)
    return {
        "cluster_name": cluster.name,
        "provider": {"type": "local", "head_ip": cluster.head_ip, "worker_ips": list(cluster.worker_ips)},
        "auth": {"ssh_user": cluster.ssh_user},
        # There are no others, and they cost the same when idle.
        "min_workers": num_nodes,
        "max_workers": num_nodes,
        **_common(cluster, {f"{GROUP_LABEL}cpu": write_group(num_nodes, cluster.groups["cpu"][1])}),
    }


def aws(cluster: RenderConfig) -> JsonObject:
    """Describes a cluster on AWS, whose nodes are added and removed with the load."""
    worker, gpu = cluster.groups["cpu"], cluster.groups["gpu"]
    types: JsonObject = {
        "head": {"node_config": {"InstanceType": _HEAD_TYPE}, "resources": {"CPU": 0}},
        "cpu": {
            "node_config": {"InstanceType": cluster.node_type},
            "resources": {name: int(amount) for name, amount in worker[1].items()},
            "min_workers": cluster.min_nodes,
            "max_workers": worker[0],
        },
    }
    if gpu[0]:
        types["gpu"] = {
            "node_config": {"InstanceType": cluster.gpu_node_type},
            "resources": {name: int(amount) for name, amount in gpu[1].items()},
            "min_workers": 0,
            "max_workers": gpu[0],
            "docker": {"worker_image": cluster.image_of("gpu")},
        }
    server = f"{cluster.file_system}.efs.{cluster.region}.amazonaws.com"
    mount = f"sudo mount -t nfs4 -o nfsvers=4.1,hard,timeo=600 {server}:/ {cluster.mount}"
    return {
        "cluster_name": cluster.name,
        "provider": {"type": "aws", "region": cluster.region, "cache_stopped_nodes": False},
        "auth": {"ssh_user": "ubuntu"},
        "max_workers": worker[0] + gpu[0],
        "idle_timeout_minutes": cluster.idle_seconds / 60,
        "available_node_types": types,
        "head_node_type": "head",
        "initialization_commands": [f"mountpoint -q {cluster.mount} || (sudo mkdir -p {cluster.mount} && {mount})"],
        **_common(cluster, head_labels(cluster)),
    }


def _common(cluster: RenderConfig, labels: dict[str, str]) -> JsonObject:
    label_list = ",".join(f"{name}={value}" for name, value in labels.items())
    start = "RAY_AUTH_MODE=token ray start"
    head = f"{start} --head --num-cpus=0 --port=6379 --dashboard-host=127.0.0.1"
    head += f" --autoscaling-config=~/ray_bootstrap_config.yaml --labels={label_list}"
    return {
        "docker": {
            "image": cluster.image_of("cpu"),
            "container_name": "ray",
            "run_options": [f"-v {cluster.mount}:{cluster.mount}", "--ulimit nofile=65536:65536"],
        },
        "file_mounts": {_TOKEN: "~/.ray/auth_token"},
        "head_start_ray_commands": ["ray stop", head],
        "worker_start_ray_commands": ["ray stop", f"{start} --address=$RAY_HEAD_IP:6379 --num-cpus={cluster.cpus}"],
    }
