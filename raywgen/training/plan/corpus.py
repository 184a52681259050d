"""The corpus that a run is planned for: one that is there, its manifest alone, or one that is to come."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from raywgen.corpus import Corpus, CorpusError
from raywgen.corpus.manifest import Contents, read_manifest
from raywgen.corpus.shards import num_pages
from raywgen.corpus.storage import CorpusStorage
from raywgen.generators import DataSpec
from raywgen.tasks.networks import build_network, network_name, network_recipe
from raywgen.training.config import TrainConfig
from raywgen.training.data import data_spec
from raywgen.training.plan.config import PlanConfig
from raywgen.weights import Layout


@dataclass(frozen=True, kw_only=True)
class PlannedCorpus:
    """The facts of a corpus that a plan needs.

    Attributes:
        name: The corpus, in words.
        layouts: Its layouts.
        recipes: The recipe of the network of each layout, by layout id; empty where nobody knows one.
        num_networks: Its checkpoints; 0 where their number is not known.
        num_bytes: Bytes of its weights.
        data: Features and classes of its tasks.
        is_validated: Whether it holds networks to validate on.
        assumptions: What is assumed, one sentence each.
    """

    name: str
    layouts: list[Layout]
    recipes: Mapping[str, Mapping[str, Any]]
    num_networks: int
    num_bytes: int
    data: DataSpec
    is_validated: bool = True
    assumptions: tuple[str, ...] = ()

    @property
    def largest(self) -> Layout:
        """The layout with the most values, by which steps are measured."""
        return max(self.layouts, key=lambda layout: layout.num_values)


def planned_corpus(config: TrainConfig, plan: PlanConfig) -> PlannedCorpus:
    """Returns what is known of the corpus of a run, and what has to be assumed.

    Raises:
        CorpusError: There is neither a corpus nor a manifest, and no `layout` in its place.
        TaskError: `layout` names no network.
    """
    if plan.layout:
        return _to_come(plan)
    try:
        corpus = Corpus.open(config.corpus)
    except CorpusError as error:
        try:
            contents = Contents.read(read_manifest(storage := CorpusStorage.at(config.corpus)), storage)
        except CorpusError:
            raise CorpusError(f"{error}; to plan without it, give layout=NAME, such as layout=vit-l") from error
        return _of_manifest(config.corpus, contents, plan)
    networks = corpus.networks
    return PlannedCorpus(
        name=corpus.location,
        layouts=[network.layout for network in networks.values()],
        recipes={key: network.recipe for key, network in networks.items() if network.recipe},
        num_networks=corpus.facts.num_rows,
        num_bytes=sum(shard.num_bytes for shard in corpus.shards),
        data=data_spec(corpus),
        is_validated=corpus.select(split="validation").num_rows > 0,
    )


def _to_come(plan: PlanConfig) -> PlannedCorpus:
    recipe = network_recipe(plan.layout)
    layout = Layout.from_state_dict(network_without_values(recipe).state_dict())
    number = f"{plan.num_networks:,} networks" if plan.num_networks else "an unknown number of networks"
    return PlannedCorpus(
        name=f"a corpus to come of {network_name(recipe)}",
        layouts=[layout],
        recipes={layout.id: recipe},
        num_networks=plan.num_networks,
        num_bytes=plan.num_networks * layout.num_bytes,
        data=_assumed_data(plan),
        assumptions=(f"The corpus holds {number} of {layout.num_values:,} values each.", _data_sentence(plan)),
    )


def _of_manifest(location: str, contents: Contents, plan: PlanConfig) -> PlannedCorpus:
    rows = dict.fromkeys(contents.networks, 0)
    for shard in contents.shards:
        rows[shard.layout_id] += shard.num_rows
    counts = (math.ceil(rows[key] / num_pages(network.layout)) for key, network in contents.networks.items())
    return PlannedCorpus(
        name=f"the manifest of {location}",
        layouts=[network.layout for network in contents.networks.values()],
        recipes={key: network.recipe for key, network in contents.networks.items() if network.recipe},
        num_networks=sum(counts),
        num_bytes=sum(shard.num_bytes for shard in contents.shards),
        data=_assumed_data(plan),
        assumptions=("Only the manifest of the corpus is there.", _data_sentence(plan)),
    )


def network_without_values(recipe: Mapping[str, Any]) -> nn.Module:
    """Builds a network without memory for its values."""
    with torch.device("meta"):
        return build_network(recipe)


def _assumed_data(plan: PlanConfig) -> DataSpec:
    return DataSpec(num_features=plan.num_features, max_classes=plan.num_classes, policies=("adam",))


def _data_sentence(plan: PlanConfig) -> str:
    return (
        f"Samples of tasks have {plan.num_features} values (num_features), and tasks {plan.num_classes} classes "
        "(num_classes)."
    )
