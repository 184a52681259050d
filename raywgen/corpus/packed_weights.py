"""Distinguishes integers that are packed quantised weights, which no generator writes, from counters and tables."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from raywgen.corpus.corpus import Corpus
from raywgen.corpus.errors import CorpusError
from raywgen.weights.tensors import TensorSpec

# Counters and settings are single numbers; a packed row of weights has several.
_FEWEST_NUMBERS = 16
_MOST_COMPARED = 8


def refuse_packed_weights(corpus: Corpus) -> None:
    """Refuses a corpus of which a tensor that generators do not write holds packed weights.

    Raises:
        CorpusError: Integers differ between the networks of an architecture as weights do, or values are packed in a
            format that torch cannot compute with.
    """
    for layout_id, network in corpus.networks.items():
        kept = [spec for spec in network.layout.tensors if may_be_packed(spec)]
        if not kept:
            continue
        facts = corpus.select(layout_id=layout_id, split="train").slice(0, _MOST_COMPARED)
        for form, part, _ in corpus.by_form(facts):
            states = [form.unpack(corpus.view(row["shard"], form).packed(row["row"])) for row in part.to_pylist()]
            names = network.layout.names_in(form)
            for spec in kept:
                if spec.dtype.startswith("float4") or _differ([state[names[spec.name]] for state in states]):
                    raise CorpusError(
                        f"{corpus.location}: tensor '{spec.name}' ({spec.dtype}{list(spec.shape)}) of '{network.name}' "
                        "holds packed weights, as it differs from network to network, and generators write no packed "
                        "weights; dequantise the networks and build the corpus of them, or leave these out by "
                        f"`raywgen corpus filter {corpus.location} OUT layout_id!={layout_id}`"
                    )


def may_be_packed(spec: TensorSpec) -> bool:
    """Whether a tensor that no generator writes may hold weights; counters and settings have fewer numbers."""
    if spec.is_generated or spec.is_constant or spec.tied_to:
        return False
    return spec.num_values >= _FEWEST_NUMBERS or spec.dtype.startswith("float4")


def _differ(tensors: Sequence[torch.Tensor]) -> bool:
    first_X, *others = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in tensors)
    return any(not torch.equal(other_X, first_X) for other_X in others)
