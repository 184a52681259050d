"""Has generators write several networks for tasks that one or two samples of each class leave open.

A hypernetwork maps what it is told to one network. Where that does not say what the task is, a generator of many may
win by right: by the best of n, chosen on the few samples, or by their mixture. Each row writes equally many networks
from the same samples alone, without an instruction:

    members             as many hypernetworks, each trained from a start of its own
    noise               one hypernetwork, with noise on what it writes
    igpg, mcdi, lohp    the generators, each drawn from as often

and `hypernetwork` is one network of the first member. A row has the accuracy of the network with the lowest loss on the
samples (`best`), the accuracy (`mixture`), log-likelihood (`likelihood`) and calibration error (`calibration`) of the
mixture, and the milliseconds in which the networks of one task are written (`ms`). Temperatures and sizes of noise are
those with the highest likelihood on validation tasks.

Shape letters beyond the legend in `raywgen.weights`: T tasks, n networks of a task.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from raywgen.benchmarks.ambiguous_config import AmbiguousTasksConfig
from raywgen.benchmarks.few_shot_parts import TaskSource, heads_zoo, trained_encoder
from raywgen.benchmarks.recipes import over_seeds
from raywgen.benchmarks.trained import trained_generators, trained_zoo
from raywgen.benchmarks.unseen_tasks import UnseenTasks, unseen_tasks
from raywgen.benchmarks.whole_network import subsets_zoo
from raywgen.corpus import Corpus
from raywgen.evaluation.few_shot.confidence import paired_difference
from raywgen.evaluation.mixtures import MixtureScore, mixture_score
from raywgen.generators import GenerationRequest, Generator
from raywgen.progress import Reporter
from raywgen.tasks import stacked_logits
from raywgen.training.session import ray_session
from raywgen.weights import KeyedNoise

_PERCENT, _MILLISECONDS = 100.0, 1e3
_NUM_TIMED = 5
_NUM_UNSEEN = 100
_NOISE_STREAM = 7

Write = Callable[[UnseenTasks], Tensor]
"""Writes n networks for each of T tasks, `(T, n, D)`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """The scores of a row, one of each task, and the milliseconds of a task's networks."""

    best_T: Tensor
    mixtures: list[MixtureScore]
    milliseconds: float

    @property
    def likelihood_T(self) -> Tensor:
        """Log-likelihood of the mixtures, nats."""
        return torch.tensor([one.log_likelihood for one in self.mixtures], dtype=torch.float64)

    def figures(self) -> dict[str, float]:
        """Returns means over tasks: accuracies and calibration error in percent, log-likelihood in nats."""
        return {
            "best": _PERCENT * float(self.best_T.mean()),
            "mixture": _PERCENT * mean(one.accuracy for one in self.mixtures),
            "likelihood": float(self.likelihood_T.mean()),
            "calibration": _PERCENT * mean(one.calibration_error for one in self.mixtures),
            "ms": self.milliseconds,
        }


def measure(config: AmbiguousTasksConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Trains zoos and generators for every seed, kind and number of samples, then scores what they write."""
    root = config.root()
    rows, conditions = [], {}
    for seed in config.all_seeds:
        row: dict[str, float] = {}
        for kind in config.kinds:
            corpus = _zoo(config, root, kind, seed)
            for shot in config.shots:
                scores, chosen = _scores(config, root, corpus, kind, shot, seed)
                prefix = f"{kind}_{shot}"
                row |= {f"{prefix}_{name}_{key}": v for name, one in scores.items() for key, v in one.figures().items()}
                conditions[prefix] = {"chosen": chosen, "over_members": _over_members(scores)}
        rows.append(row)
    figures, spreads = over_seeds(rows)
    return figures, config.conditions(spreads) | conditions | {"networks": config.num_networks, "each_seed": rows}


def _zoo(config: AmbiguousTasksConfig, root: str, kind: str, seed: int) -> Corpus:
    if kind == "subsets":
        recipe = subsets_zoo(config.data, config.test_data, config.zoo, seed)
    else:
        few_shot = config.few_shot_config()
        encoder, _ = trained_encoder(few_shot, root, seed)
        recipe = replace(heads_zoo(few_shot, seed, encoder, TaskSource()), num_unseen_tasks=_NUM_UNSEEN)
    with ray_session():
        return trained_zoo(root, recipe)


def _scores(
    config: AmbiguousTasksConfig, root: str, corpus: Corpus, kind: str, shot: int, seed: int
) -> tuple[dict[str, Scores], dict[str, float]]:
    """Trains the rows of one kind and number of samples; returns their scores, and what was chosen for each."""
    num = config.num_networks
    members = {}
    with ray_session():
        generators = trained_generators(config, root, corpus, config.generators(kind), shot=shot, seed=seed)
        for index in range(num):
            chosen = {f"member-{index}": ("direct", config.hypernetwork(kind))}
            members |= trained_generators(config, root, corpus, chosen, shot=shot, seed=seed + 1000 * index)
    unseen, validation = (unseen_tasks(corpus, split, shot, seed) for split in ("unseen", "validation"))
    hypernetworks = list(members.values())
    rows: dict[str, Callable[[float, UnseenTasks], Tensor]] = {
        "noise": partial(_noisy, hypernetworks[0], num, seed),
        **{name: partial(_drawn, generator, num, seed) for name, generator in generators.items()},
    }
    scores = {
        "hypernetwork": _scored(unseen, partial(_joined, hypernetworks[:1], seed)),
        "members": _scored(unseen, partial(_joined, hypernetworks, seed)),
    }
    best: dict[str, float] = {}
    with Reporter().step("judge", f"{kind}, {shot} samples of each class") as bar:
        for done, (name, write) in enumerate(rows.items()):
            bar.named(done, len(rows), name)
            values = config.noises if name == "noise" else config.temperatures
            best[name] = max(
                values, key=lambda value: float(_judged(validation, partial(write, value)).likelihood_T.mean())
            )
            scores[name] = _scored(unseen, partial(write, best[name]))
        bar.named(len(rows), len(rows), "done")
    return scores, best


def _drawn(generator: Generator, num: int, seed: int, temperature: float, tasks: UnseenTasks) -> Tensor:
    """Draws networks from the samples alone, `(T, n, D)`."""
    condition = tasks.condition.reading(instruction=False) if generator.reads_parts else tasks.condition
    noise = KeyedNoise(seed, torch.arange(len(condition) * num), 0)
    request = GenerationRequest(
        condition=condition.repeat(num), layout=tasks.layout, noise=noise, temperature=temperature
    )
    return generator.generate(request).values_BD.view(len(condition), num, -1)


def _joined(hypernetworks: Sequence[Generator], seed: int, tasks: UnseenTasks) -> Tensor:
    """Writes one network by each of n hypernetworks, `(T, n, D)`."""
    return torch.cat([_drawn(one, 1, seed, 0.0, tasks) for one in hypernetworks], dim=1)


def _noisy(hypernetwork: Generator, num: int, seed: int, size: float, tasks: UnseenTasks) -> Tensor:
    """Adds noise to the network of one hypernetwork, n times, `(T, n, D)`."""
    written_T1D = _drawn(hypernetwork, 1, seed, 0.0, tasks)
    normalizer = hypernetwork.normalizer(tasks.layout)
    keys = KeyedNoise(seed, torch.arange(len(written_T1D) * num), _NOISE_STREAM)
    noise_TnD = keys.normal(written_T1D.shape[-1]).view(len(written_T1D), num, -1)
    return normalizer.denormalise(normalizer.normalise(written_T1D) + size * noise_TnD)


def _judged(tasks: UnseenTasks, write: Write) -> Scores:
    """Scores the networks of all tasks, which are written at once."""
    written_TnD = write(tasks)
    best, mixtures = [], []
    for index, task in enumerate(tasks.tasks):
        state_n = tasks.layout.unflatten(written_TnD[index])
        logits_nIC = stacked_logits(tasks.module, state_n, task.test_x_SF)
        chosen = int(tasks.example_loss(index, written_TnD[index]).argmin())
        best.append(mixture_score(logits_nIC[chosen : chosen + 1], task.test_y_S).accuracy)
        mixtures.append(mixture_score(logits_nIC, task.test_y_S))
    return Scores(best_T=torch.tensor(best, dtype=torch.float64), mixtures=mixtures, milliseconds=0.0)


def _scored(tasks: UnseenTasks, write: Write) -> Scores:
    """Scores the networks of all tasks, and times those of single ones."""
    taken = []
    for index in range(_NUM_TIMED + 1):  # The first one is warm-up.
        place = index % len(tasks.tasks)
        alone = replace(tasks, tasks=tasks.tasks[place : place + 1], condition=tasks.condition_of(place))
        begin = time.perf_counter()
        write(alone)
        taken.append(_MILLISECONDS * (time.perf_counter() - begin))
    return replace(_judged(tasks, write), milliseconds=median(taken[1:]))


def _over_members(scores: Mapping[str, Scores]) -> dict[str, list[float]]:
    """Returns by how many nats the mixture of each row is likelier than that of the members, with its half width."""
    members, found = scores["members"], {}
    for name, one in scores.items():
        if name != "members":
            difference = paired_difference(one.likelihood_T, members.likelihood_T)
            found[name] = [round(difference.mean, 4), round(difference.half_width, 4)]
    return found
