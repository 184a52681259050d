"""Facts that a run needs of its corpus before it begins: units of weights, kinds of tasks, names of policies."""

from __future__ import annotations

from pathlib import Path

import torch

from raywgen.corpus import Corpus, CorpusError
from raywgen.corpus.moments import tensor_moments
from raywgen.corpus.packed_weights import refuse_packed_weights
from raywgen.corpus.tokens import is_tokens
from raywgen.generators import DataSpec
from raywgen.locations import joined
from raywgen.storage import Storage
from raywgen.tasks import build_task
from raywgen.tasks.no_task import BLANK
from raywgen.training.rows import policy_names
from raywgen.training.stored_weights import StoredWeights
from raywgen.weights import Layout, Normalizer, NormalizerTable
from raywgen.weights.cache import cache_folder
from raywgen.weights.vector_file import write_vector

# Values of a start that a process holds in memory.
_MOST_HELD = 1 << 22
_PART = 1 << 22


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


def measure_normalizers(corpus: Corpus, folder: str | Path | None = None) -> NormalizerTable:
    """Base and scale of every layout, from its training networks.

    Args:
        corpus: The corpus.
        folder: The folder for starts that large networks share, which are mapped from there, or from copies on each
            node where it is a URI; None holds them in memory.

    Raises:
        CorpusError: The corpus holds tokens, or weights packed in integers, which no generator writes.
    """
    if is_tokens(corpus):
        raise CorpusError(
            f"{corpus.location} holds tokens, not weights; train on the corpus of weights, with "
            f"generator.prior.tokens={corpus.location}"
        )
    refuse_packed_weights(corpus)
    normalizers = {}
    for layout_id, found in tensor_moments(corpus).items():
        layout = corpus.layout(layout_id)
        start_file = _start_file(corpus, layout, folder)
        start_D = corpus.base_values(layout_id) if found.shares_start and start_file is None else None
        normalizer = Normalizer.from_units(layout, found.mean_N.float(), found.spread_N.float(), start_D)
        if start_file is not None:
            normalizer = normalizer.with_start_file(*start_file)
        normalizers[layout_id] = (layout, normalizer)
    return normalizers


def _start_file(corpus: Corpus, layout: Layout, folder: str | Path | None) -> tuple[Path, str] | None:
    """Writes the start that large networks of a layout share; returns None where they share none, or it is small.

    Returns:
        Its local file, and the URI that other nodes fetch it from if there is one.
    """
    facts = corpus.select(layout_id=layout.id, split="base")
    if folder is None or layout.num_values <= _MOST_HELD or facts.num_rows != 1:
        return None
    # The checksum tells the starts of two corpora apart, which may be trained on in one folder one after another.
    name = f"{layout.id}-{facts.column('sha256')[0].as_py()[:16]}.safetensors"
    storage = Storage.at(folder)
    path = Path(storage.root if storage.is_local else cache_folder() / "starts") / name
    if not path.is_file():
        weights, first = StoredWeights(corpus, layout, facts), torch.zeros(1, dtype=torch.int64)
        starts = range(0, layout.num_values, _PART)
        parts = (weights.windows(first, first + at, min(_PART, layout.num_values - at))[0] for at in starts)
        write_vector(path, layout.num_values, parts)
    if storage.is_local:
        return path, ""
    if storage.size(name) != path.stat().st_size:
        storage.upload(path, name)
    return path, joined(folder, name)


def data_spec(corpus: Corpus) -> DataSpec:
    """Features and classes of the corpus' tasks; of none where only weights are known."""
    tasks = [build_task(task.recipe) for task in corpus.tasks.values()] or [build_task({"name": BLANK})]
    splits = corpus.facts.column("split").to_pylist()
    policies = {name for name, split in zip(policy_names(corpus), splits, strict=True) if split == "train"}
    num_values, num_read = tasks[0].train_inputs.num_features, tasks[0].num_condition_features
    return DataSpec(
        num_features=num_read or num_values,
        max_classes=max(task.num_classes for task in tasks),
        policies=tuple(sorted(policies)),
        num_sample_values=num_values if num_read else 0,
    )
