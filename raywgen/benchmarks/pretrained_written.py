"""Makes a corpus of published networks, and has an IGPG trained on it generate each network again.

Each network has a task of its own, which differs from the others' in the description of the network alone. So there is
one network per condition, and a generator that succeeds has retrieved it: `agreement` and `novelty` measure how far.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from raywgen.benchmarks.pretrained_networks import Pretrained
from raywgen.benchmarks.recipes import folder_of
from raywgen.corpus import Corpus
from raywgen.corpus.build import BuildConfig, build_corpus
from raywgen.evaluation.novelty import nearest_stored
from raywgen.generators import GenerationRequest
from raywgen.generators.igpg import IGPG, SamplingConfig
from raywgen.generators.igpg.token_sampling import sample_tokens
from raywgen.tasks import build_task
from raywgen.training.stored_weights import StoredWeights
from raywgen.weights import Condition, KeyedNoise
from raywgen.zoo.describe import describe_corpus


def pretrained_corpus(root: str, networks: Sequence[Pretrained], task: Mapping[str, Any]) -> Corpus:
    """Builds and describes a corpus of networks, which is kept under a hash of its recipe.

    Args:
        root: Folder of all kept parts.
        networks: Their files; each one's name is that of its task.
        task: Recipe of what all of them do, with paths that any process can read.
    """
    tasks = {network.name: dict(task) | {"instruction": instruction(network, task)} for network in networks}
    sums = {str(network.file): float(network.values_D.double().square().sum()) for network in networks}
    folder = folder_of(root, "corpus", {"tasks": tasks, "networks": sums})
    facts = Path(f"{folder}-facts.json")
    facts.parent.mkdir(parents=True, exist_ok=True)
    facts.write_text(json.dumps([_facts(network) for network in networks]))
    files = [str(network.file.absolute()) for network in networks]
    corpus = build_corpus(BuildConfig(out=folder, sources=files, facts=str(facts), distributed=False))
    recipes = {corpus.networks[network.layout.id].name: network.recipe for network in networks}
    descriptions = Path(f"{folder}-networks.yaml")
    descriptions.write_text(yaml.safe_dump({"tasks": tasks, "networks": recipes}))
    return describe_corpus(corpus.location, str(descriptions))


def instruction(network: Pretrained, task: Mapping[str, Any]) -> str:
    """Says name, architecture and data of a network in words."""
    question = build_task(task).instruction
    return f"{network.name}, a ResNet of depth {network.depth} with {network.layout.num_values} values: {question}"


def _facts(network: Pretrained) -> dict[str, str]:
    architecture = f"resnet{network.depth}"
    return {"path": str(network.file.absolute()), "architecture": architecture, "task_id": network.name}


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """One network that a generator wrote.

    Attributes:
        values_D: Flat vector.
        reconstructed_D: The stored network through the generator's own tokens.
        figures: By name: the share of tokens drawn that are the stored network's; its distance to the nearest
            stored network of its layout, root mean square in standard deviations of each tensor, 0 of a copy; and the
            mean negative log-probability of the stored network's tokens, in nats.
    """

    values_D: Tensor
    reconstructed_D: Tensor
    figures: dict[str, float]


@torch.no_grad()
def written_again(
    generator: IGPG, corpus: Corpus, network: Pretrained, sampling: SamplingConfig, temperature: float, seed: int
) -> Written:
    """Writes a network of the corpus from its instruction and labelled images, without sight of its weights."""
    layout, task = network.layout, corpus.tasks[network.name]
    condition = Condition(
        instructions=(task.instruction,),
        samples_BSF=task.samples_SF.unsqueeze(0),
        labels_BS=task.labels_S.unsqueeze(0),
    )
    tokenizer, noise = generator.tokenizer, KeyedNoise(seed, torch.arange(1))
    table = tokenizer.table(layout)
    made = generator.generate(
        GenerationRequest(condition=condition, layout=layout, noise=noise, temperature=temperature, sampling=sampling)
    )
    # The drawn tokens, because encoding the written weights again changes many of them.
    sample = sample_tokens(
        generator.prior,
        condition,
        table,
        tokenizer.quantiser,
        KeyedNoise(seed, torch.arange(1)),
        temperature,
        replace(sampling, decoding="tokens"),
    )
    stored_1D = network.values_D.unsqueeze(0)
    tokens_1ML = generator.tokens(stored_1D, layout)
    log_prob_1 = generator.log_prob(stored_1D, condition, layout, sampling)
    stored = StoredWeights(corpus, corpus.layout(layout.id), corpus.select(layout_id=layout.id))
    distance_1, _ = nearest_stored(made.values_BD, stored, generator.normalizers[layout.id][1])
    return Written(
        values_D=made.values_BD[0],
        reconstructed_D=generator.reconstruct(stored_1D, layout)[0],
        figures={
            "generated_agreement": float((sample.codes_BML == tokens_1ML).double().mean()),
            "generated_novelty": float(distance_1),
            "generated_nats_per_token": -float(log_prob_1) / (table.num_real_tokens or tokens_1ML.numel()),
        },
    )
