"""The ladder of one zoo of one task: accuracy of held-out, written and baseline networks on test images.

Every row is the mean of equally many networks, none of which was chosen. Novelty is measured against all checkpoints
that the generator was trained on; where networks have own starts, up to the order of their hidden units.

Shape letters beyond the legend in `raywgen.weights`: N networks of a row, R stored networks, S training checkpoints, I
test images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from raywgen.benchmarks.equal_accuracy import (
    Reached,
    averages,
    farthest_of,
    farthest_on_curve,
    nearest_distance,
    noise_curve,
    noisy,
    spread,
)
from raywgen.corpus import Corpus
from raywgen.evaluation.finetuning import FineTuningConfig, fine_tune
from raywgen.evaluation.novelty import error_overlap
from raywgen.generators import GenerationRequest, Generator
from raywgen.tasks import FitConfig, balanced_accuracy, build_network, build_task, draw_condition
from raywgen.training.data import measure_normalizers
from raywgen.weights import KeyedNoise
from raywgen.weights.symmetry import find_symmetry
from raywgen.zoo.measure import network_logits

OnProgress = Callable[[int, int, str], None]
_CONDITION_STREAM, _NOISE_STREAM = 3, 4
# First sample index of keyed noise; training counts its samples from 0, so the noise differs.
_FIRST_SAMPLE = 1 << 20


@dataclass(kw_only=True)
class LadderConfig:
    """Settings of generation and of the ladder.

    Attributes:
        num_networks: Networks of each row; the row of held-out ones has all of them.
        temperature: Sampling temperature of generation.
        num_condition_samples: Labelled training images in each network's condition, drawn anew for each.
        finetuned: Networks that are fine-tuned, of the generated and of random ones; 0 for none.
        finetune_epochs: Epochs of fine-tuning after which accuracy is measured.
        epoch_images: Images of an epoch.
        learning_rate: Learning rate of fine-tuning; the zoo's by default.
        noise: Noise of the row `noise`, in standard deviations of each tensor.
        noise_levels: Levels among which the noise that is as accurate as generated networks is searched.
        averaged: Numbers of stored networks that are averaged.
    """

    num_networks: int = 16
    temperature: float = 1.0
    num_condition_samples: int = 64
    finetuned: int = 3
    finetune_epochs: list[int] = field(default_factory=lambda: [1, 5, 25])
    epoch_images: int = 10_000
    learning_rate: float = 3e-3
    noise: float = 0.1
    noise_levels: list[float] = field(default_factory=lambda: [0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.9])
    averaged: list[int] = field(default_factory=lambda: [2, 5, 10])

    def __post_init__(self) -> None:
        if self.num_networks < 1 or self.finetuned < 0 or self.temperature < 0:
            raise ValueError(
                f"num_networks={self.num_networks}, finetuned={self.finetuned}, temperature={self.temperature}: "
                "give at least 1, 0 and 0"
            )
        if self.finetuned > self.num_networks:
            raise ValueError(f"finetuned={self.finetuned}: only num_networks={self.num_networks} are written")
        if not self.noise_levels or min(self.noise_levels) <= 0 or not self.averaged or min(self.averaged) < 2:
            raise ValueError(
                f"noise_levels={self.noise_levels} must be above 0, averaged={self.averaged} at least 2; give some"
            )
        if not self.finetune_epochs or min(self.finetune_epochs) < 1 or self.epoch_images < 1:
            raise ValueError(
                f"finetune_epochs={self.finetune_epochs}, epoch_images={self.epoch_images}: give some, all at least 1"
            )


class Ladder:
    """The ladder of a corpus of one architecture and one task, split by trajectory.

    Args:
        corpus: The zoo.
        config: Settings of the ladder.
        seed: Seed of all draws.
    """

    def __init__(self, corpus: Corpus, config: LadderConfig, seed: int) -> None:
        ((layout_id, network),) = corpus.networks.items()
        (facts,) = corpus.tasks.values()
        self._config, self._seed = config, seed
        self._network, self._layout = network, network.layout
        self._module = build_network(network.recipe).eval()
        self._task = build_task(facts.recipe)
        self._normalizer = measure_normalizers(corpus)[layout_id][1]
        is_own = corpus.base_values(layout_id) is None
        self._symmetry = find_symmetry(self._module, self._task.train_inputs[:2]) if is_own else None
        train = corpus.select(split="train").sort_by("step")
        self._stored_SD = corpus.values(train)
        self._trajectories = train.column("trajectory_id").to_pylist()
        # In order of step, so that the last one of a trajectory stays.
        ends = {name: index for index, name in enumerate(self._trajectories)}
        self._ends_RD = self._stored_SD[sorted(ends.values())]
        held = corpus.select(split="heldout").sort_by("step")
        held_ends = {name: index for index, name in enumerate(held.column("trajectory_id").to_pylist())}
        self._heldout_ND = corpus.values(held)[sorted(held_ends.values())]

    def conditions(self) -> dict[str, Any]:
        """Returns the sizes of everything that was measured."""
        return {
            "values": self._layout.num_values,
            "training_networks": len(self._ends_RD),
            "training_checkpoints": len(self._stored_SD),
            "heldout_networks": len(self._heldout_ND),
            "networks_of_a_row": self._config.num_networks,
            "test_images": len(self._task.test_y_S),
            "temperature": self._config.temperature,
        }

    def figures(self, generator: Generator, token_prior: Generator, on_progress: OnProgress) -> dict[str, float]:
        """Measures accuracy in percent, and distances in standard deviations of each tensor."""
        rows = {"original": self._heldout_ND, "reconstructed": generator.reconstruct(self._heldout_ND, self._layout)}
        rows |= {"generated": self._written(generator), "token_prior": self._written(token_prior)} | self._baselines()
        figures = {}
        for index, (name, values_ND) in enumerate(rows.items()):
            on_progress(index, len(rows) + 3, name)
            figures[name] = self._percent(values_ND)
        figures["ratio"] = figures["generated"] / figures["original"]
        on_progress(len(rows), len(rows) + 3, "fine-tuning")
        figures |= self._finetuned(rows["generated"], rows["random"])
        on_progress(len(rows) + 1, len(rows) + 3, "novelty")
        figures |= self._novelty(rows)
        on_progress(len(rows) + 2, len(rows) + 3, "noise and averages at equal accuracy")
        figures |= self._at_equal_accuracy(figures["generated"])
        on_progress(len(rows) + 3, len(rows) + 3, "done")
        return figures

    def _written(self, generator: Generator) -> Tensor:
        index_N = _FIRST_SAMPLE + torch.arange(self._config.num_networks)
        condition = draw_condition(
            [self._task] * len(index_N),
            self._config.num_condition_samples,
            KeyedNoise(self._seed, index_N, _CONDITION_STREAM),
        )
        noise = KeyedNoise(self._seed, index_N, _NOISE_STREAM)
        return generator.generate(
            GenerationRequest(
                condition=condition, layout=self._layout, noise=noise, temperature=self._config.temperature
            )
        ).values_BD

    def _baselines(self) -> dict[str, Tensor]:
        num, normalizer = self._config.num_networks, self._normalizer
        seen_RD = normalizer.normalise(self._ends_RD)
        draw_ND = torch.randn(num, seen_RD.shape[1], generator=torch.Generator().manual_seed(self._seed))
        with torch.random.fork_rng():
            torch.manual_seed(self._seed)
            fresh = [self._layout.flatten(build_network(self._network.recipe).state_dict()) for _ in range(num)]
        return {
            "random": torch.stack(fresh),
            "average": self._ends_RD.mean(dim=0, keepdim=True),
            "gaussian": normalizer.denormalise(seen_RD.mean(dim=0) + seen_RD.std(dim=0) * draw_ND),
            "noise": noisy(self._copies(), self._config.noise, normalizer, self._seed),
        }

    def _copies(self) -> Tensor:
        """Returns stored networks to add noise to, `(N, D)`."""
        order_R = torch.randperm(len(self._ends_RD), generator=torch.Generator().manual_seed(self._seed))
        return self._ends_RD[order_R[torch.arange(self._config.num_networks) % len(order_R)]]

    def _logits(self, values_ND: Tensor) -> Tensor:
        return network_logits(self._module, self._layout.unflatten(values_ND), self._task.test_x_SF, "sequential")

    def _percent(self, values_ND: Tensor) -> float:
        return 100 * float(balanced_accuracy(self._logits(values_ND), self._task.test_y_S).mean())

    def _finetuned(self, generated_ND: Tensor, random_ND: Tensor) -> dict[str, float]:
        num, config = self._config.finetuned, self._config
        if not num:
            return {}
        tuning = FineTuningConfig(
            epochs=max(config.finetune_epochs),
            epoch_samples=config.epoch_images,
            learning_rates=[config.learning_rate],
            fit=FitConfig(loss="plain"),
            execution="sequential",
            seed=self._seed,
        )
        starts = {"finetuned": generated_ND[:num], "random_finetuned": random_ND[:num]}
        tuned = fine_tune(self._module, self._layout, starts, [self._task] * num, tuning)
        return {
            f"{name}_{epochs}": 100 * float(one.accuracy_TE[:, epochs].mean())
            for name, one in tuned.items()
            for epochs in config.finetune_epochs
        }

    def _novelty(self, rows: dict[str, Tensor]) -> dict[str, float]:
        """Measures the distance to the nearest stored network, errors in common, and the distance among one another."""
        figures = {}
        for name, prefix in (("generated", ""), ("original", "original_")):
            values_ND = rows[name]
            near_N = nearest_distance(values_ND, self._stored_SD, self._normalizer, self._layout, self._symmetry)
            figures[f"{prefix}novelty"] = float(near_N.mean())
            figures[f"{prefix}overlap"] = self._overlap(values_ND)
            figures[f"{prefix}spread"] = spread(values_ND, self._normalizer)
        return figures

    def _overlap(self, values_ND: Tensor) -> float:
        """Returns the mean over networks of the largest overlap of errors with a stored network.

        The overlap is the errors in common over the errors of either. All ends of trajectories are compared and not the
        nearest alone, because similarity in behaviour does not depend on the order of units.
        """
        wrong_NI = self._logits(values_ND).argmax(dim=-1) != self._task.test_y_S
        stored_RI = self._logits(self._ends_RD).argmax(dim=-1) != self._task.test_y_S
        most = [error_overlap(wrong_I.expand_as(stored_RI), stored_RI).amax() for wrong_I in wrong_NI]
        return float(torch.stack(most).mean())

    def _at_equal_accuracy(self, accuracy: float) -> dict[str, float]:
        """Measures the novelty of noise and averages that are as accurate as the generated networks."""
        config, num = self._config, self._config.num_networks
        curve = noise_curve(self._copies(), config.noise_levels, self._normalizer, self._seed, self._reached)
        means = [
            averages(self._stored_SD, groups, k, num, self._seed)
            for groups in (None, self._trajectories)
            for k in config.averaged
        ]
        return {
            "noise_novelty": farthest_on_curve(accuracy, curve),
            "average_novelty": farthest_of(accuracy, (self._reached(one) for one in means if one is not None)),
        }

    def _reached(self, values_ND: Tensor) -> Reached:
        """Measures accuracy and novelty without matching of units, which favours noise and averages."""
        near_N = nearest_distance(values_ND, self._stored_SD, self._normalizer, self._layout)
        return Reached(accuracy=self._percent(values_ND), distance=float(near_N.mean()))
