"""Scores a user's own weights file on a task of a corpus."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from raywgen.corpus import Corpus, NetworkFacts
from raywgen.corpus.chosen import task_named
from raywgen.tasks import balanced_accuracy, balanced_cross_entropy, build_network, build_task, stacked_logits
from raywgen.weights import Layout, LayoutMismatchError, StateDict, load_state_dict


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """The result of a network on a task.

    Attributes:
        network: Name of its architecture in the corpus.
        accuracy: Balanced accuracy on the task's test samples, in [0, 1].
        loss: Class-balanced cross-entropy on them, nats.
        num_test_samples: Number of these samples.
    """

    network: str
    accuracy: float
    loss: float
    num_test_samples: int


@torch.no_grad()
def score_file(path: str | Path, corpus: Corpus, task_id: str) -> Score:
    """Reads weights safely, finds their architecture by layout and runs them on the task's test samples.

    Raises:
        WeightsError: The file is missing, truncated, holds pickled code, NaN, or no layout of the corpus.
        UnknownFactError: The corpus has no such task.
    """
    facts = task_named(corpus, task_id)
    state = load_state_dict(path)
    network = _network(state, corpus, path)
    state = _as_built(state, network.layout)
    network.layout.check(state, str(path))
    task = build_task(facts.recipe)
    stacked = {name: tensor.unsqueeze(0) for name, tensor in state.items()}
    logits = stacked_logits(build_network(network.recipe).eval(), stacked, task.test_x_SF)
    return Score(
        network=network.name,
        accuracy=float(balanced_accuracy(logits, task.test_y_S)),
        loss=float(balanced_cross_entropy(logits, task.test_y_S)),
        num_test_samples=len(task.test_y_S),
    )


def _as_built(state: Mapping[str, Tensor], layout: Layout) -> StateDict:
    """Returns the same network under the names and in the dtypes of its architecture."""
    form = Layout.from_state_dict(state).arranged_like(layout)
    names = form.names_in(layout)
    kept = {names[spec.name]: state[spec.name] for spec in form.tensors if spec.name in names and not spec.is_generated}
    return layout.unflatten(form.flatten(state), counters=kept)


def _network(state: Mapping[str, Tensor], corpus: Corpus, path: str | Path) -> NetworkFacts:
    """Returns the architecture with these names and shapes; where none fits, raises the error of the closest one."""
    failures: list[tuple[int, LayoutMismatchError]] = []
    for network in corpus.networks.values():
        wanted = {spec.name: spec.shape for spec in network.layout.tensors}
        if Layout.from_state_dict(state).id == network.layout.id:
            return network
        agree = sum(wanted.get(name) == tuple(tensor.shape) for name, tensor in state.items())
        try:
            network.layout.check(state, f"{path} as {network.name}")
        except LayoutMismatchError as error:
            failures.append((agree, error))
    raise max(failures, key=lambda failure: failure[0])[1]
