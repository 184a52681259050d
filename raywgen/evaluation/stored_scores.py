"""Scores stored networks on given labelled samples, many at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute
import torch
from torch import Tensor

from raywgen.corpus import Corpus
from raywgen.corpus.at_once import networks_at_once
from raywgen.generation import ConditionError
from raywgen.tasks import balanced_accuracy, balanced_cross_entropy, build_network
from raywgen.zoo.measure import network_logits

# Arrow makes these functions when it is imported, so type checkers do not see them.
pc: Any = pyarrow.compute

_NO_NETWORKS = ("base", "optimizer")


class MisfitError(ConditionError):
    """Networks of a layout cannot be run on the samples; the message says why."""


def trained_ends(corpus: Corpus, terms: list[str]) -> pa.Table:
    """Returns the facts of the last checkpoint of every trajectory that satisfies all terms, without starts.

    Raises:
        CorpusError, UnknownFactError: A term is not a valid query.
        ConditionError: No network satisfies them.
    """
    facts = corpus.query(terms)
    facts = facts.filter(pc.invert(pc.is_in(facts.column("split"), value_set=pa.array(_NO_NETWORKS))))
    facts = facts.sort_by([("step", "ascending"), ("checkpoint_id", "ascending")])
    keys = zip(facts.column("trajectory_id").to_pylist(), facts.column("layout_id").to_pylist(), strict=True)
    last = {key: row for row, key in enumerate(keys)}
    if not last:
        raise ConditionError(f"{corpus.location} holds no trained network of {terms or 'any kind'}; loosen the terms")
    return facts.take(sorted(last.values()))


@torch.no_grad()
def stored_scores(
    corpus: Corpus,
    facts: pa.Table,
    samples_SF: Tensor,
    labels_S: Tensor,
    on_progress: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns class-balanced loss in nats and balanced accuracy, `(N,)` each, of checkpoints of one layout.

    Memory holds the weights of one stack at a time. A network whose loss is not finite gets an infinite one.

    Args:
        corpus: Corpus of the checkpoints.
        facts: Facts of N checkpoints.
        samples_SF: Inputs, float32.
        labels_S: Classes, int64.
        on_progress: Called with the number of networks done.

    Raises:
        MisfitError: The architecture cannot be built, does not take such samples or has too few outputs.
        DamagedFileError: A shard cannot be read.
    """
    network = corpus.networks[facts.column("layout_id")[0].as_py()]
    if not network.recipe:
        raise MisfitError(
            f"{corpus.location} holds weights of '{network.name}' but not what its module is, so it cannot be run; "
            "a corpus of `raywgen zoo train` knows it"
        )
    module = build_network(network.recipe).eval()
    at_once = networks_at_once(network.layout.num_values)
    losses, accuracies = [], []
    for first in range(0, facts.num_rows, at_once):
        state_N = network.layout.unpack(corpus.packed(facts.slice(first, at_once)))
        state_N = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state_N.items()}
        try:
            logits_NSC = network_logits(module, state_N, samples_SF, "stacked")
        except RuntimeError as error:
            raise MisfitError(
                f"'{network.name}' does not take samples of {samples_SF.shape[1]} values: {error}"
            ) from error
        if logits_NSC.dim() != 3 or logits_NSC.shape[2] <= int(labels_S.max()):
            raise MisfitError(
                f"'{network.name}' gives outputs {list(logits_NSC.shape[2:])}, labels go up to {int(labels_S.max())}"
            )
        loss_N = balanced_cross_entropy(logits_NSC, labels_S)
        losses.append(loss_N.nan_to_num(nan=torch.inf, posinf=torch.inf))
        accuracies.append(balanced_accuracy(logits_NSC, labels_S))
        if on_progress is not None:
            on_progress(min(first + at_once, facts.num_rows))
    return torch.cat(losses), torch.cat(accuracies)
