"""Facts that a run needs of its corpus before it begins: units of weights, kinds of tasks, names of policies."""

from __future__ import annotations

from raywgen.corpus import Corpus, CorpusError
from raywgen.corpus.packed_weights import refuse_packed_weights
from raywgen.generators import DataSpec
from raywgen.tasks import build_task
from raywgen.tasks.no_task import BLANK
from raywgen.training.rows import policy_names
from raywgen.training.stored_weights import StoredWeights
from raywgen.training.tensor_moments import measured_normalizer
from raywgen.weights import NormalizerTable


def has_tasks(corpus: Corpus) -> bool:
    """Whether the corpus knows of every network how it is built, and of every checkpoint what it was trained for.

    Raises:
        CorpusError: It knows that of some checkpoints only.
    """
    splits, named = corpus.facts.column("split").to_pylist(), corpus.facts.column("task_id").to_pylist()
    known = [name in corpus.tasks for name, split in zip(named, splits, strict=True) if split != "base"]
    if any(known) and not all(known):
        raise CorpusError(
            f"{corpus.location}: {known.count(False)} of {len(known)} checkpoints have no task; filter them out, or "
            "describe all by `raywgen corpus describe`"
        )
    return all(known) and all(network.recipe for network in corpus.networks.values())


def measure_normalizers(corpus: Corpus) -> NormalizerTable:
    """Base and scale of every layout, from its training networks.

    Raises:
        CorpusError: Weights are packed in integers, which no generator writes.
    """
    refuse_packed_weights(corpus)
    normalizers = {}
    for layout_id, network in corpus.networks.items():
        weights = StoredWeights(corpus, network.layout, corpus.select(layout_id=layout_id, split="train"))
        start_D = corpus.base_values(layout_id)
        normalizers[layout_id] = (network.layout, measured_normalizer(weights, network.layout, start_D))
    return normalizers


def data_spec(corpus: Corpus) -> DataSpec:
    """Features and classes of the corpus' tasks; of none where only weights are known."""
    tasks = [build_task(task.recipe) for task in corpus.tasks.values()] or [build_task({"name": BLANK})]
    splits = corpus.facts.column("split").to_pylist()
    policies = {name for name, split in zip(policy_names(corpus), splits, strict=True) if split == "train"}
    return DataSpec(
        num_features=tasks[0].train_inputs.num_features,
        max_classes=max(task.num_classes for task in tasks),
        policies=tuple(sorted(policies)),
    )
