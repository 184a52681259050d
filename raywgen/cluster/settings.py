"""The settings of a cluster for raywgen."""

from __future__ import annotations

from dataclasses import dataclass, field

from raywgen.training.resource_check import Resources


@dataclass(kw_only=True)
class RenderConfig:
    """Settings of a cluster.

    Attributes:
        name: Name of the cluster, its service, token secret and storage claim.
        namespace: Kubernetes namespace.
        ray_version: Ray version of images and manifests; empty takes the installed one.
        python: Python version of the images.
        image: Repository of the images; those of Ray lack a few packages, which jobs install by runtime_env.yaml.
        cpus: CPUs of a worker node.
        memory: Memory of a worker node, in Kubernetes' notation.
        min_nodes: Number of worker nodes that stay while nothing runs.
        max_nodes: Largest number of worker nodes that the autoscaler may start.
        gpus: GPUs of a node of the GPU group.
        gpu_memory: Memory of a node of the GPU group.
        max_gpu_nodes: Largest number of nodes of the GPU group, which scales from 0.
        idle_seconds: Seconds after which an unused node is removed.
        mount: Path of the shared storage on all nodes.
        storage_size: Size of the storage claim.
        storage_class: Storage class that many nodes may write to; empty takes the default one.
        token_secret: Secret whose key `auth_token` holds the cluster's token; empty lets the operator create one.
        s3_secret: Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, for corpora at s3:// addresses.
        service_account: Kubernetes service account whose role may read these, instead of a secret.
        dashboard_namespaces: Namespaces, beside the cluster's own, whose pods may reach its dashboard and job server.
        egress_ports: TCP ports that nodes may reach outside: object storage, package indexes, and the Kubernetes API,
            through which the autoscaler adds nodes. Add the port of your own storage server.
        code: Location of the code for a RayJob: a folder that nodes mount, or the URI of a zip file.
        head_ip: Address of the on-premise head node.
        worker_ips: Addresses of the on-premise worker nodes.
        ssh_user: User on the on-premise nodes.
        region: Region of the cloud.
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
        """Largest number of nodes of each group, and the resources of a node as Ray sees them."""
        return {
            "cpu": (self.max_nodes, {"CPU": float(self.cpus)}),
            "gpu": (self.max_gpu_nodes, {"CPU": float(self.cpus), "GPU": float(self.gpus)}),
        }

    def image_of(self, kind: str) -> str:
        """Returns the image of `cpu` or `gpu` nodes."""
        return f"{self.image}:{self.ray_version}-py{self.python.replace('.', '')}-{kind}"
