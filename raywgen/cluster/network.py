"""Kubernetes network policies that say who may reach a cluster's ports, and what its pods may reach."""

from __future__ import annotations

from raywgen.cluster.settings import RenderConfig
from raywgen.json_types import JsonObject

CLUSTER_LABEL = "raywgen/cluster"
"""A label of every pod. Ray's own label has the name of the cluster, which a RayJob draws anew each time."""
_DASHBOARD = 8265
_DNS = 53
_METADATA_PORTS = (80, 988)
_OPERATOR = {"app.kubernetes.io/component": "kuberay-operator"}
# At this address clouds give any pod the credentials of its machine.
_METADATA = "169.254.0.0/16"
_METADATA_V6 = "fd00:ec2::/32"


def network_policies(cluster: RenderConfig) -> JsonObject:
    """Returns one policy for the permanent cluster, and one for the clusters of RayJobs."""
    names = (cluster.name, job_clusters(cluster))
    return {"apiVersion": "v1", "kind": "List", "items": [_policy(cluster, name) for name in names]}


def job_clusters(cluster: RenderConfig) -> str:
    """Returns the value of `CLUSTER_LABEL` for the pods of RayJobs."""
    return f"{cluster.name}-train"


def _policy(cluster: RenderConfig, name: str) -> JsonObject:
    ours = {"podSelector": {"matchLabels": {CLUSTER_LABEL: name}}}
    outside: list[JsonObject] = [
        {"ipBlock": {"cidr": "0.0.0.0/0", "except": [_METADATA]}},
        {"ipBlock": {"cidr": "::/0", "except": [_METADATA_V6]}},
    ]
    egress: list[JsonObject] = [
        {"to": [ours]},
        {"ports": [{"protocol": protocol, "port": _DNS} for protocol in ("UDP", "TCP")]},
        {"to": outside, "ports": _tcp(*cluster.egress_ports)},
    ]
    if cluster.service_account:
        # A service account gets its credentials from such an address.
        egress.append({"to": [{"ipBlock": {"cidr": _METADATA}}], "ports": _tcp(*_METADATA_PORTS)})
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": cluster.namespace},
        "spec": {
            "podSelector": ours["podSelector"],
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": [ours]}, {"from": _users(cluster), "ports": _tcp(_DASHBOARD)}],
            "egress": egress,
        },
    }


def _users(cluster: RenderConfig) -> list[JsonObject]:
    """Selects the pods of the cluster's namespace, those of the named namespaces, and KubeRay's operator anywhere."""
    named: list[JsonObject] = [
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}
        for name in cluster.dashboard_namespaces
    ]
    return [{"podSelector": {}}, *named, {"namespaceSelector": {}, "podSelector": {"matchLabels": dict(_OPERATOR)}}]


def _tcp(*ports: int) -> list[JsonObject]:
    return [{"protocol": "TCP", "port": port} for port in ports]
