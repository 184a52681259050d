"""The settings of a cluster for raywgen."""

from __future__ import annotations

from dataclasses import dataclass, field

from raywgen.training.resource_check import Resources


@dataclass(kw_only=True)
class RenderConfig:
    """A cluster.

    Attributes:
        name: Of the cluster, and of its service, token secret and storage claim.
        namespace: Of Kubernetes.
        ray_version: Of images and manifests; empty takes the installed Ray's.
        python: Of the images.
        image: Repository of the images; those of Ray lack a few packages, which jobs install by runtime_env.yaml.
        cpus: CPUs of a worker node.
        memory: Of a worker node, as Kubernetes writes it.
        min_nodes: Worker nodes that stay while nothing runs.
        max_nodes: Worker nodes at most; the autoscaler moves between the two.
        gpus: GPUs of a node of the GPU group.
        gpu_memory: Memory of a node of the GPU group.
        max_gpu_nodes: Nodes of the GPU group at most; they scale from nothing.
        idle_seconds: After which an unused node is given back.
        mount: Where all nodes see the shared storage.
        storage_size: Asked of the storage class.
        storage_class: A class that many nodes may write to; empty takes the default one.
        token_secret: Secret whose key `auth_token` holds the cluster's token; empty lets the operator draw one.
        s3_secret: Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, for corpora at s3:// addresses.
        service_account: Kubernetes service account whose role may read those, in place of a secret.
        dashboard_namespaces: Namespaces, beside the cluster's own, whose pods may reach its dashboard and job server.
        egress_ports: TCP ports by which nodes reach what lies outside: object storage, package indexes, and the
            Kubernetes API, by which the autoscaler adds nodes. Add that of a storage server of your own.
        code: Where a RayJob finds the code: a folder that nodes mount, or a zip file's URI.
        head_ip: Of the on-premise head node.
        worker_ips: Of the on-premise worker nodes.
        ssh_user: For on-premise nodes.
        region: Of the cloud.
        file_system: Id of the cloud's shared file system (EFS).
        node_type: The cloud's name for a worker node of `cpus` CPUs.
        gpu_node_type: The cloud's name for a node of `gpus` GPUs.
    """

    name: str = "raywgen"
    namespace: str = "default"
    ray_version: str = ""
    python: str = "3.11"
    image: str = "rayproject/ray"
    cpus: int = 8
    memory: str = "32Gi"
    min_nodes: int = 1
    max_nodes: int = 16
    gpus: int = 1
    gpu_memory: str = "64Gi"
    max_gpu_nodes: int = 8
    idle_seconds: int = 300
    mount: str = "/mnt/raywgen"
    storage_size: str = "500Gi"
    storage_class: str = ""
    token_secret: str = ""
    s3_secret: str = ""
    service_account: str = ""
    dashboard_namespaces: list[str] = field(default_factory=list)
    egress_ports: list[int] = field(default_factory=lambda: [80, 443, 6443])
    code: str = "local:///mnt/raywgen/code"
    head_ip: str = "192.0.2.10"
    worker_ips: list[str] = field(default_factory=lambda: ["192.0.2.11", "192.0.2.12"])
    ssh_user: str = "ubuntu"
    region: str = "eu-central-1"
    file_system: str = "fs-0123456789abcdef0"
    node_type: str = "m7i.2xlarge"
    gpu_node_type: str = "g6.2xlarge"

    def __post_init__(self) -> None:
        if not self.ray_version:
            import ray

            self.ray_version = ray.__version__
        if not 0 <= self.min_nodes <= self.max_nodes or self.max_gpu_nodes < 0:
            raise ValueError(f"min_nodes={self.min_nodes} must lie between 0 and max_nodes={self.max_nodes}")
        if self.cpus < 1 or self.gpus < 1:
            raise ValueError("cpus and gpus must be at least 1: they are those of one node")

    @property
    def groups(self) -> dict[str, tuple[int, Resources]]:
        """Node groups: how many nodes at most, and what Ray sees on each."""
        return {
            "cpu": (self.max_nodes, {"CPU": float(self.cpus)}),
            "gpu": (self.max_gpu_nodes, {"CPU": float(self.cpus), "GPU": float(self.gpus)}),
        }

    def image_of(self, kind: str) -> str:
        """The image of `cpu` or `gpu` nodes."""
        return f"{self.image}:{self.ray_version}-py{self.python.replace('.', '')}-{kind}"
