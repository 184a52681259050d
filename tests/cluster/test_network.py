"""The rendered network policies, against Kubernetes' schema and by what they let through."""

from __future__ import annotations

import ipaddress
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from raywgen.cluster.network import CLUSTER_LABEL
from raywgen.cluster.render import render
from raywgen.cluster.settings import RenderConfig
from raywgen.training import TrainConfig

SCHEMA = json.loads((Path(__file__).parent / "schemas" / "networkpolicy.json").read_text())
OPERATOR = {"app.kubernetes.io/name": "kuberay-operator", "app.kubernetes.io/component": "kuberay-operator"}


def rendered(file: str, **settings: Any) -> dict[str, Any]:
    return yaml.safe_load(render(TrainConfig(), RenderConfig(**settings))[file])


def policies(**settings: Any) -> list[dict[str, Any]]:
    return rendered("network.yaml", **settings)["items"]


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    return selector.get("matchLabels", {}).items() <= labels.items()


def lets_in(policy: dict[str, Any], namespace: str, labels: dict[str, str], port: int) -> bool:
    """As Kubernetes decides of a connection from a pod."""
    for rule in policy["spec"]["ingress"]:
        if "ports" in rule and port not in [entry["port"] for entry in rule["ports"]]:
            continue
        for peer in rule["from"]:
            spaces = {"kubernetes.io/metadata.name": namespace}
            inside = (
                selects(peer["namespaceSelector"], spaces)
                if "namespaceSelector" in peer
                else namespace == policy["metadata"]["namespace"]
            )
            if inside and selects(peer.get("podSelector", {}), labels):
                return True
    return False


def lets_out(policy: dict[str, Any], address: str, port: int, protocol: str = "TCP") -> bool:
    """As Kubernetes decides of a connection to an address outside of the cluster."""
    for rule in policy["spec"]["egress"]:
        ports = [(entry["protocol"], entry["port"]) for entry in rule.get("ports", [])]
        if ports and (protocol, port) not in ports:
            continue
        blocks = [peer["ipBlock"] for peer in rule.get("to", []) if "ipBlock" in peer]
        at = ipaddress.ip_address(address)
        if "to" not in rule or any(
            at in ipaddress.ip_network(block["cidr"])
            and not any(at in ipaddress.ip_network(other) for other in block.get("except", []))
            for block in blocks
        ):
            return True
    return False


@pytest.mark.parametrize("settings", [{}, {"service_account": "reader", "dashboard_namespaces": ["lab"]}])
def test_kubernetes_takes_them(settings: dict[str, Any]) -> None:
    validator = jsonschema.Draft202012Validator(SCHEMA | {"$ref": "#/$defs/NetworkPolicy"})
    for policy in policies(**settings):
        assert [error.message for error in validator.iter_errors(policy)] == []


def test_every_pod_stands_under_its_policy() -> None:
    cluster, job = policies(name="mine")
    for policy, spec in (
        (cluster, rendered("raycluster.yaml", name="mine")["spec"]),
        (job, rendered("rayjob.yaml", name="mine")["spec"]["rayClusterSpec"]),
    ):
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            labels = group["template"]["metadata"]["labels"]
            assert selects(policy["spec"]["podSelector"], labels)
            assert lets_in(policy, "default", labels, 6379)
            assert lets_in(policy, "default", labels, 34567)


def test_others_reach_the_dashboard_at_most() -> None:
    (policy, _) = policies(name="mine", namespace="research", dashboard_namespaces=["lab"])
    assert lets_in(policy, "research", {"app": "notebook"}, 8265)
    assert lets_in(policy, "lab", {}, 8265)
    assert lets_in(policy, "kuberay", OPERATOR, 8265)
    assert not lets_in(policy, "other", {}, 8265)
    ours = {CLUSTER_LABEL: "mine"}
    assert not lets_in(policy, "other", ours, 6379), "a label is no pass in another namespace"
    for port in (6379, 10001, 8076, 22):
        assert not lets_in(policy, "research", {"app": "notebook"}, port)
        assert not lets_in(policy, "lab", {}, port)


def test_downloads_work_and_credentials_of_machines_are_out_of_reach() -> None:
    (policy, _) = policies()
    assert lets_out(policy, "10.96.0.10", 53, "UDP")
    assert lets_out(policy, "169.254.20.10", 53, "UDP"), "DNS of the node"
    assert lets_out(policy, "151.101.0.223", 443), "PyPI and S3"
    assert lets_out(policy, "10.0.0.1", 6443), "the Kubernetes API, for the autoscaler"
    assert not lets_out(policy, "169.254.169.254", 80)
    assert not lets_out(policy, "fd00:ec2::254", 80)
    assert not lets_out(policy, "203.0.113.5", 25)
    assert lets_out(policies(egress_ports=[443, 9000])[0], "10.1.2.3", 9000), "a storage server of one's own"
    assert lets_out(policies(service_account="reader")[0], "169.254.169.254", 80)
