"""Writes low-rank adapters of a causal language model for domains that were never seen, beside other ways.

A domain is the texts with a certain word, and words of unseen domains are those of no other; with `left_out` their
texts are of files that no other domain has. The model is a small decoder that is trained here on other files, or any of
transformers by `base`. All rows are next-word loss in nats a token on test texts of unseen domains; lower is better.

    none_16            the model as it is
    average_16         the mean of the stored adapters
    shared_16          one adapter for all domains, trained by the loss of all for as many steps as the hypernetwork, at
                       the rate that is best on validation domains
    gradient_16        an adapter trained on the same texts, at the rate and steps that are best on validation domains
    gradient_all_16    the zoo's own adapters, trained on all training texts of the domain
    hypernetwork_16, igpg_16               what these write from the 16 texts and the instruction
    hypernetwork_text_16, ..._examples_16  from one of both alone
    shuffled_16        what the best of these writes from the texts and the instruction of another domain
    ms_ROW_16          CPU milliseconds that an adapter takes; 0 where it is made once

Conditions hold standard errors over domains, and paired differences to other rows.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from raywgen.benchmarks.lora_causal_config import LoRACausalConfig
from raywgen.benchmarks.lora_rows import Reads, written_adapters
from raywgen.benchmarks.recipes import over_seeds
from raywgen.benchmarks.shared_network import SharedNetwork
from raywgen.benchmarks.small_decoder import small_decoder
from raywgen.benchmarks.trained import loaded_runs, trained_zoo
from raywgen.benchmarks.unseen_tasks import unseen_tasks
from raywgen.corpus import Corpus
from raywgen.generators import Generator
from raywgen.tasks import FitConfig, FitData, Recorded, balanced_cross_entropy, fit, repeat_state, stacked_logits
from raywgen.training.session import ray_session
from raywgen.zoo.plan import initial_state

__all__ = ["LoRACausalConfig", "measure"]

_MILLISECONDS = 1e3
_PARTS: tuple[Reads, ...] = ("text", "examples")
_BESIDE = ("none", "shared", "gradient")


@dataclass(frozen=True, slots=True, kw_only=True)
class LossRow:
    """The adapters of one origin.

    Attributes:
        loss_T: Next-word loss on each domain's test texts, nats a token.
        milliseconds: CPU milliseconds that an adapter takes; 0 where none is made for a domain.
    """

    loss_T: Tensor
    milliseconds: float = 0.0

    @property
    def mean(self) -> float:
        """The mean over domains."""
        return float(self.loss_T.mean())

    @property
    def error(self) -> float:
        """The standard error of that mean."""
        return float(self.loss_T.std()) / len(self.loss_T) ** 0.5


class DomainRows:
    """Domains of a split with the same texts for all rows.

    Args:
        corpus: The zoo.
        split: `validation` or `unseen`.
        shot: Texts of each domain.
        seed: Keys the texts.
    """

    def __init__(self, corpus: Corpus, split: str, shot: int, seed: int) -> None:
        (network,) = corpus.networks.values()
        self.unseen = unseen_tasks(corpus, split, shot, seed)
        self.layout, self.tasks = self.unseen.layout, self.unseen.tasks
        self.start_D = self.layout.flatten(initial_state(network.recipe, seed))
        self.conditions = [self.unseen.condition_of(index) for index in range(len(self.tasks))]
        self._corpus, self._seed = corpus, seed

    @torch.no_grad()
    def judged(self, values_TD: Tensor, milliseconds: float = 0.0) -> LossRow:
        """Judges an adapter of each domain on its test texts."""
        losses = [
            balanced_cross_entropy(
                stacked_logits(self.unseen.module, self.layout.unflatten(own_1D), task.test_x_SF), task.test_y_S
            )
            for own_1D, task in zip(values_TD.split(1), self.tasks, strict=True)
        ]
        return LossRow(loss_T=torch.cat(losses), milliseconds=milliseconds)

    def one_for_all(self, values_D: Tensor) -> LossRow:
        """Judges the same adapter on all domains."""
        return self.judged(values_D.expand(len(self.tasks), -1))

    def average(self) -> LossRow:
        """Judges the mean of the stored adapters of seen domains."""
        last = max(self._corpus.facts.column("step").to_pylist())
        return self.one_for_all(self._corpus.values(self._corpus.query(["split=train", f"step={last}"])).mean(dim=0))

    def trained_on_all(self) -> LossRow:
        """Judges the adapters that the zoo trained on all training texts of these domains."""
        return self.judged(self.unseen.originals_TD)

    def written(self, generator: Generator, shift: int = 0, reads: Reads = "both") -> LossRow:
        """Judges what a generator writes; arguments as in `written_adapters`."""
        return self.judged(*written_adapters(generator, self.conditions, self.layout, self._seed, shift, reads))

    def gradient(self, rate: float, steps: Sequence[int]) -> dict[int, LossRow]:
        """Trains an adapter of each domain on its texts alone; returns rows by number of steps, the last one timed."""
        config = FitConfig(optimizer="adamw", learning_rate=rate, num_steps=max(steps), batch_size=16, loss="plain")
        start = Recorded(step=0, state_N=repeat_state(self.layout.unflatten(self.start_D), 1))
        begin, ends = time.process_time(), []
        for index, condition in enumerate(self.conditions):
            data = FitData(x=condition.samples_BSF[0], labels_NS=condition.labels_BS)
            recorded = fit(
                self.unseen.module,
                start,
                data,
                config,
                order_seeds=[index],
                record_steps=sorted(steps),
                execution="sequential",
            )
            ends.append([self.unseen.flat(one)[0] for one in recorded])
        taken = _MILLISECONDS * (time.process_time() - begin) / len(self.tasks)
        return {
            num: self.judged(torch.stack(values), taken)
            for num, values in zip(sorted(steps), zip(*ends, strict=True), strict=True)
        }


def measure(config: LoRACausalConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Trains model, zoo and generators for every seed, and judges what these write for unseen domains."""
    root, figures, details = config.root(), [], []
    for seed in config.all_seeds:
        base = config.base or small_decoder(root, config.decoder, seed)
        with ray_session() if config.distributed else nullcontext():
            corpus = trained_zoo(root, config.zoo_of(seed, base), distributed=config.distributed)
        rows, chosen = _rows(config, corpus, loaded_runs(config.runs(root, corpus.location, seed)), seed)
        _print(config.shot, rows)
        own = {f"{name}_{config.shot}": row.mean for name, row in rows.items()}
        own |= {f"ms_{name}_{config.shot}": row.milliseconds for name, row in rows.items()}
        figures.append(own)
        details.append({"seed": seed, "num_domains": len(rows["none"].loss_T), **chosen, **_spreads(rows)})
    means, spreads = over_seeds(figures)
    conditions = {"data": config.data, "left_out": config.left_out, "each": details, "each_seed": figures}
    return means, config.conditions(spreads) | conditions


def _rows(
    config: LoRACausalConfig, corpus: Corpus, generators: Mapping[str, Generator], seed: int
) -> tuple[dict[str, LossRow], dict[str, Any]]:
    """Judges every row on the unseen domains; returns what was chosen on validation domains, too."""
    unseen, validation = (DomainRows(corpus, split, config.shot, seed) for split in ("unseen", "validation"))
    # B of a start is zero, so its adapter changes nothing.
    rows = {"none": unseen.one_for_all(unseen.start_D), "average": unseen.average()}
    shared: dict[float, Tensor] = {}
    for rate in config.shared_rates:
        generator = generators[config.shared_name(rate)]
        assert isinstance(generator, SharedNetwork)
        shared[rate] = generator.network(unseen.layout).detach()
    shared_rate = min(shared, key=lambda rate: validation.one_for_all(shared[rate]).mean)
    rows["shared"] = unseen.one_for_all(shared[shared_rate])
    tried = {
        (rate, num): row.mean for rate in config.rates for num, row in validation.gradient(rate, config.steps).items()
    }
    rate, steps = min(tried, key=lambda key: tried[key])
    rows["gradient"] = unseen.gradient(rate, [steps])[steps]
    rows["gradient_all"] = unseen.trained_on_all()
    for name in config.methods:
        rows[name] = unseen.written(generators[name])
        rows |= {f"{name}_{reads}": unseen.written(generators[name], reads=reads) for reads in _PARTS}
    best = min(config.methods, key=lambda name: validation.written(generators[name]).mean)
    rows["shuffled"] = unseen.written(generators[best], shift=1)
    chosen = {"shared": shared_rate, "gradient": {"rate": rate, "steps": steps}, "shuffled": best}
    return rows, chosen


def _spreads(rows: Mapping[str, LossRow]) -> dict[str, Any]:
    """Returns standard errors, and paired differences with those of their means."""
    differences = {}
    for name, row in rows.items():
        for other in _BESIDE:
            if name != other:
                gain = LossRow(loss_T=row.loss_T - rows[other].loss_T)
                differences[f"{name} - {other}"] = [round(gain.mean, 4), round(gain.error, 4)]
    errors = {name: round(row.error, 4) for name, row in rows.items()}
    return {"standard_errors": errors, "paired_differences": differences}


def _print(shot: int, rows: Mapping[str, LossRow]) -> None:
    table = Table(f"{shot} texts", "nats a token", "±", "ms an adapter")
    for name, row in rows.items():
        table.add_row(name, f"{row.mean:.3f}", f"{row.error:.3f}", f"{row.milliseconds:.1f}")
    Console().print(table)
