"""Kubernetes network policies: who reaches a cluster's ports, and what its pods reach."""

from __future__ import annotations

from typing import Any

from raywgen.cluster.settings import RenderConfig

CLUSTER_LABEL = "raywgen/cluster"
"""A label of every pod; Ray's own label holds the name of the cluster, which a RayJob draws anew each time."""
_DASHBOARD = 8265
_DNS = 53
_METADATA_PORTS = (80, 988)
_OPERATOR = {"app.kubernetes.io/component": "kuberay-operator"}
# Here clouds answer any pod with the credentials of its machine.
_METADATA = "169.254.0.0/16"
_METADATA_V6 = "fd00:ec2::/32"


def network_policies(cluster: RenderConfig) -> dict[str, Any]:
    """One policy for the cluster that stays, and one for the clusters of RayJobs."""
    names = (cluster.name, job_clusters(cluster))
    return {"apiVersion": "v1", "kind": "List", "items": [_policy(cluster, name) for name in names]}


def job_clusters(cluster: RenderConfig) -> str:
    """The value of `CLUSTER_LABEL` that the pods of RayJobs have."""
    return f"{cluster.name}-train"


def _policy(cluster: RenderConfig, name: str) -> dict[str, Any]:
    ours = {"podSelector": {"matchLabels": {CLUSTER_LABEL: name}}}
    outside: list[dict[str, Any]] = [
        {"ipBlock": {"cidr": "0.0.0.0/0", "except": [_METADATA]}},
        {"ipBlock": {"cidr": "::/0", "except": [_METADATA_V6]}},
    ]
    egress: list[dict[str, Any]] = [
        {"to": [ours]},
        {"ports": [{"protocol": protocol, "port": _DNS} for protocol in ("UDP", "TCP")]},
        {"to": outside, "ports": _tcp(*cluster.egress_ports)},
    ]
    if cluster.service_account:
        # The credentials of a service account come from such an address.
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


def _users(cluster: RenderConfig) -> list[dict[str, Any]]:
    """Pods of the cluster's own namespace, of those that are named, and KubeRay's operator wherever it runs."""
    named = [
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}
        for name in cluster.dashboard_namespaces
    ]
    return [{"podSelector": {}}, *named, {"namespaceSelector": {}, "podSelector": {"matchLabels": dict(_OPERATOR)}}]


def _tcp(*ports: int) -> list[dict[str, Any]]:
    return [{"protocol": "TCP", "port": port} for port in ports]
