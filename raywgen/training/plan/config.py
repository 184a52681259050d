"""The settings of a plan, beside those of the run that is planned."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from raywgen.config import ConfigError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(kw_only=True)
class PlanConfig:
    """The settings that say what is planned for, where no corpus and no cluster do.

    Attributes:
        layout: The architecture of the networks in place of the corpus': a network's name such as `vit-l`, the widths
            of a perceptron, a recipe, or `package.module:Class`.
        num_networks: Number of networks of the corpus that is to come.
        num_features: Values of a labelled sample of its tasks.
        num_classes: Most classes of a task.
        nodes: Number of nodes; 0 for those of the cluster of `RAY_ADDRESS`, or else this machine.
        cpus: CPUs of each node; 0 for as many as this machine has.
        gpus_per_node: GPUs of each node.
        gpu_memory: Memory of each GPU, such as `80GiB`.
        memory: Memory of each node, such as `512GiB`; empty for as much as this machine has.
        measure: Whether a step of each stage is measured on this machine, in a process of its own.
        measured_steps: Steps of each stage that are measured.
        seconds_per_step: Seconds of a step, where they are known: a number, or one for each stage, such as
            `{tokenizer: 0.1, prior: 0.5}`.
        price_per_node_hour: Price of a node for an hour; 0 for no price.
    """

    layout: Any = ""
    num_networks: int = 0
    num_features: int = 768
    num_classes: int = 10
    nodes: int = 0
    cpus: int = 0
    gpus_per_node: int = 0
    gpu_memory: str = ""
    memory: str = ""
    measure: bool = False
    measured_steps: int = 8
    seconds_per_step: Any = None
    price_per_node_hour: float = 0.0

    def __post_init__(self) -> None:
        if min(self.nodes, self.cpus, self.gpus_per_node, self.num_networks) < 0 or self.price_per_node_hour < 0:
            raise ValueError("nodes, cpus, gpus_per_node, num_networks and price_per_node_hour: give at least 0")
        if min(self.num_features, self.num_classes) < 1:
            raise ValueError(f"num_features={self.num_features}, num_classes={self.num_classes}: give at least 1")
        if self.measured_steps < 6:
            raise ValueError(f"measured_steps={self.measured_steps}: give at least 6, as not all of them count")
        if self.gpus_per_node and not self.gpu_memory:
            raise ValueError("gpus_per_node: give gpu_memory too, such as gpu_memory=80GiB")
        if not self.nodes and (self.cpus or self.gpus_per_node or self.memory):
            raise ValueError("cpus, gpus_per_node and memory are those of nodes given by hand; give nodes too")
        for text in (self.gpu_memory, self.memory):
            num_bytes(text)
        given = self.seconds_per_step
        seconds = list(given.values()) if isinstance(given, dict) else [] if given is None else [given]
        if not all(isinstance(each, int | float) and each > 0 for each in seconds):
            raise ValueError(f"seconds_per_step={given}: give seconds above 0, or such of each stage")


def num_bytes(text: str) -> int:
    """Reads an amount of memory such as `80GiB`, `64 GB` or plain bytes; 0 for an empty text.

    Raises:
        ValueError: It is none.
    """
    if not text:
        return 0
    found = re.fullmatch(r"([\d.]+)\s*([kmgt]?i?)b?", text.strip().lower())
    if not found or found[2] not in _UNITS:
        raise ValueError(f"'{text}' is no amount of memory; give one such as 80GiB")
    return int(float(found[1]) * _UNITS[found[2]])


def split_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separates the overrides of a plan from those of the run that is planned.

    Raises:
        ConfigError: One is no `key=value`.
    """
    names = {field.name for field in fields(PlanConfig)}
    own: list[str] = []
    of_run: list[str] = []
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals:
            raise ConfigError(f"'{override}' is not an override; write it as key=value, for instance nodes=4")
        (own if key.partition(".")[0] in names else of_run).append(override)
    return own, of_run
