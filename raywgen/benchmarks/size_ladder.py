"""Measures networks of one size by their origin: equally many of each kind, chosen in the same way.

Shape letters beyond the legend in `raywgen.weights`: N networks of a row, P of them chosen, n candidates of each
choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from raywgen.benchmarks.equal_accuracy import spread
from raywgen.benchmarks.resized_networks import num_blocks, stretched, widened
from raywgen.corpus import Corpus
from raywgen.evaluation.finetuning import FineTuningConfig, fine_tune
from raywgen.generation import with_new_statistics
from raywgen.tasks import (
    FitConfig,
    Task,
    balanced_accuracy,
    balanced_cross_entropy,
    build_network,
    draw_condition,
)
from raywgen.weights import Condition, KeyedNoise, Layout, Normalizer
from raywgen.zoo.measure import network_logits

_CONDITION_STREAM, _NOISE_STREAM = 3, 4
# First sample index of keyed noise; training counts its samples from 0, so the noise differs.
_FIRST_SAMPLE = 1 << 20


Varied = Literal["depth", "width"]
"""In what networks of a zoo differ: the number of their layers, or their channels."""


def of_size(recipe: Mapping[str, Any], varied: Varied, size: int) -> dict[str, Any]:
    """Returns the recipe of a network like another one, but of another depth, or another width of the first stage.

    The widths of the other stages keep their ratio to that of the first.
    """
    if varied == "depth":
        return {**recipe, "depth": size}
    first, *_ = recipe["widths"]
    return {**recipe, "widths": [size * width // first for width in recipe["widths"]]}


def size_of(recipe: Mapping[str, Any], varied: Varied) -> int:
    """Returns the depth of a network, or the width of its first stage."""
    return int(recipe["depth"] if varied == "depth" else recipe["widths"][0])


@dataclass(frozen=True, slots=True)
class StoredSize:
    """Trained networks of one size."""

    size: int
    layout: Layout
    values_ND: Tensor


def stored_networks(corpus: Corpus, varied: Varied) -> dict[int, StoredSize]:
    """Returns the ends of all trajectories, by size in ascending order."""
    last = max(corpus.facts.column("step").to_pylist())
    found = {}
    for layout_id, network in corpus.networks.items():
        values_ND = corpus.values(corpus.select(layout_id=layout_id, step=last))
        size = size_of(network.recipe, varied)
        found[size] = StoredSize(size, network.layout, values_ND)
    return dict(sorted(found.items()))


class SizeLadder:
    """The rows of one depth or width.

    Args:
        task: Task of all networks.
        originals: Networks of this size, trained as the zoo's were.
        recipe: Recipe of a network of this size.
        varied: In what the zoo's networks differ.
        best_of: Candidates of each choice, made by the loss on the labelled samples of the condition.
        num_chosen: Number of choices; a figure is their mean.
        num_condition_samples: Labelled training samples of each choice.
        num_unlabelled: Training samples from which statistics of batch normalisation are estimated anew.
        seed: Seed of all draws.
    """

    def __init__(
        self,
        task: Task,
        originals: StoredSize,
        recipe: Mapping[str, Any],
        varied: Varied,
        *,
        best_of: int,
        num_chosen: int,
        num_condition_samples: int,
        num_unlabelled: int,
        seed: int,
    ) -> None:
        self.layout, self.size, self._varied = originals.layout, originals.size, varied
        self._task, self._originals, self._recipe, self._seed = task, originals, dict(recipe), seed
        self._module = build_network(self._recipe).eval()
        self._best_of, self._num = best_of, best_of * num_chosen
        index_P = _FIRST_SAMPLE + torch.arange(num_chosen)
        noise = KeyedNoise(seed, index_P, _CONDITION_STREAM)
        self._condition = draw_condition([task] * num_chosen, num_condition_samples, noise)
        order_S = torch.randperm(len(task.train_inputs), generator=torch.Generator().manual_seed(seed))
        self._unlabelled_SF = task.train_inputs[order_S[:num_unlabelled]]

    @property
    def condition(self) -> Condition:
        """Condition of all candidates, N rows."""
        return self._condition.repeat(self._best_of)

    @property
    def noise(self) -> KeyedNoise:
        """Keyed noise of all candidates."""
        return KeyedNoise(self._seed, _FIRST_SAMPLE + torch.arange(self._num), _NOISE_STREAM)

    def start(self) -> Tensor:
        """Returns a fresh network `(D,)`."""
        return self.random()[0]

    def original(self) -> Tensor:
        """Returns trained networks, `(N, D)`."""
        return self._repeated(self._originals.values_ND)

    def random(self) -> Tensor:
        """Returns networks before any training, `(N, D)`."""
        with torch.random.fork_rng():
            torch.manual_seed(self._seed)
            fresh = [self.layout.flatten(build_network(self._recipe).state_dict()) for _ in range(self._num)]
        return torch.stack(fresh)

    def can_resize(self, stored: StoredSize) -> bool:
        """Whether stored networks can be brought to this size: to another depth only where blocks can be repeated."""
        return self._varied == "width" or num_blocks(stored.layout) > 1 or num_blocks(self.layout) == 1

    def resized(self, stored: StoredSize) -> Tensor:
        """Brings stored networks of another size to this one, `(N, D)`."""
        return self._repeated(self._resized(stored))

    def average(self, stored: Mapping[int, StoredSize]) -> Tensor:
        """Returns the mean `(1, D)` of all stored networks that can be brought to this size."""
        can = [self._resized(one) for one in stored.values() if self.can_resize(one)]
        return torch.cat(can).mean(dim=0, keepdim=True)

    def with_new_statistics(self, values_ND: Tensor) -> Tensor:
        """Estimates running statistics of batch normalisation anew from unlabelled training samples."""
        return with_new_statistics(self._module, self.layout, values_ND, self._unlabelled_SF)

    def chosen(self, values_ND: Tensor) -> Tensor:
        """Chooses the best of every n by the loss on the labelled samples, `(P, D)`; a single network stays."""
        if len(values_ND) == 1:
            return values_ND
        condition = self.condition
        losses = []
        for values_D, x_SF, labels_S in zip(values_ND, condition.samples_BSF, condition.labels_BS, strict=True):
            losses.append(balanced_cross_entropy(self._logits(values_D[None], x_SF), labels_S))
        loss_Pn = torch.cat(losses).view(-1, self._best_of)
        # argmin would treat a NaN as the smallest loss.
        index_P = loss_Pn.masked_fill(loss_Pn.isnan(), torch.inf).argmin(dim=1)
        return values_ND[index_P + torch.arange(len(loss_Pn)) * self._best_of]

    def percent(self, values_ND: Tensor) -> float:
        """Returns the mean accuracy on the test samples in percent."""
        logits = self._logits(values_ND, self._task.test_x_SF)
        return 100 * float(balanced_accuracy(logits, self._task.test_y_S).mean())

    def diversity(self, values_ND: Tensor) -> float:
        """Returns the mean distance of two networks, divided by that of two trained ones."""
        originals_ND = self._originals.values_ND
        normalizer = Normalizer.measure(self.layout, originals_ND, None)
        return spread(values_ND, normalizer) / max(spread(originals_ND, normalizer), 1e-12)

    def fine_tuned(self, starts: Mapping[str, Tensor], fit: FitConfig, rates: list[float]) -> dict[str, float]:
        """Returns the accuracy in percent after one epoch from each start `(P, D)`.

        The learning rate of each start is chosen on part of the training samples.
        """
        (num,) = {len(start_PD) for start_PD in starts.values()}
        tuning = FineTuningConfig(
            epochs=1,
            learning_rates=rates,
            fit=replace(fit, schedule="constant"),
            execution="sequential",
            seed=self._seed,
        )
        tuned = fine_tune(self._module, self.layout, starts, [self._task] * num, tuning)
        return {name: 100 * float(one.accuracy_TE[:, 1].mean()) for name, one in tuned.items()}

    def _resized(self, stored: StoredSize) -> Tensor:
        resize = stretched if self._varied == "depth" else widened
        return resize(stored.values_ND, stored.layout, self.layout)

    def _repeated(self, values_ND: Tensor) -> Tensor:
        """Repeats networks until there are as many as candidates."""
        return values_ND[torch.arange(self._num) % len(values_ND)]

    def _logits(self, values_ND: Tensor, x_SF: Tensor) -> Tensor:
        return network_logits(self._module, self.layout.unflatten(values_ND), x_SF, "sequential")
