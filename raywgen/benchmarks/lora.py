"""Writes low-rank adapters of a sentence encoder for tasks that were never seen, beside training and other baselines.

Tasks are "Is the sentence about S1, or about S2?", with S1 and S2 disjoint sets of the classes of a text set; unseen
ones recombine the classes on sentences that nothing was trained on, with `heldout` have a class that no other task
had, and with `others` are of a data set that is left out whole. With `family=words` they ask for words and lengths.
All rows are judged with the same head, ridge regression on the same examples, its strength by leaving each out.

    head_16            accuracy in percent, 16 examples a class, of the encoder as it is with the best pooling
    average_16         of the mean of the stored adapters
    nearest_16         of the stored adapter that fits the examples best, each left out in turn
    nearest_text_16    of the stored adapter whose instruction is the most similar
    regression_16      of ridge regression from instruction and examples to the products of stored adapters
    gradient_16        of an adapter trained on the examples, at the rate and steps that are best on validation tasks
    gradient_all_16    of the zoo's own adapters, trained on all training sentences of the task
    start_16, gradient_start_16    with `zoo='[start=meta,...]'`: of the start itself, and of training from there
    shared_16          of one adapter for all tasks, trained by the loss of all for as many steps as the hypernetwork
    hypernetwork_16, igpg_16, mcdi_16, lohp_16    of what these write from examples (and instruction, the first two)
    igpg_text_16, igpg_examples_16, ...    of what the first two write from one of both alone
    shuffled_16        of what the best of these writes for the examples and the instruction of another task
    ms_ROW_16          CPU milliseconds that an adapter takes; 0 where it is made once; `nearest_text` and `regression`
                       without the encoder's features of instruction and examples, which they are given

Conditions hold standard errors, and paired differences to other rows. Draws of examples for one task are averaged
first, so the errors are over tasks; those of a single task are over its draws, and `errors_over` says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from raywgen.benchmarks.lora_config import METHODS, LoRAConfig
from raywgen.benchmarks.lora_rows import POOLINGS, AdapterRows, Reads, Row
from raywgen.benchmarks.lora_stored import STRENGTHS
from raywgen.benchmarks.recipes import over_seeds
from raywgen.benchmarks.shared_network import SharedNetwork
from raywgen.benchmarks.trained import loaded_runs, trained_zoo
from raywgen.corpus import Corpus
from raywgen.generators import Generator
from raywgen.training.session import ray_session
from raywgen.zoo.plan import initial_state

__all__ = ["LoRAConfig", "measure"]

_FROM_META = "gradient_start"
_BESIDE = ("head", "shared", "gradient")
_PARTS: tuple[Reads, ...] = ("text", "examples")


def measure(config: LoRAConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Trains zoo and generators for every seed, and judges what they write for the unseen tasks."""
    root, figures, details = config.root(), [], []
    for seed in config.all_seeds:
        with ray_session() if config.distributed else nullcontext():
            corpus = trained_zoo(root, config.zoo_of(seed), distributed=config.distributed)
        generators = loaded_runs(config.runs(root, corpus.location, seed))
        own: dict[str, float] = {}
        for shot in config.shots:
            rows, chosen = _rows(config, corpus, generators, shot, seed)
            _print(shot, rows)
            own |= {f"{name}_{shot}": row.percent for name, row in rows.items()}
            own |= {f"ms_{name}_{shot}": row.milliseconds for name, row in rows.items()}
            details.append({"seed": seed, "shot": shot, **chosen, **_spreads(rows)})
        figures.append(own)
    means, spreads = over_seeds(figures)
    conditions = {
        "data": config.data,
        "others": config.others,
        "heldout": config.heldout,
        "each": details,
        "each_seed": figures,
    }
    return means, config.conditions(spreads) | conditions


def _rows(
    config: LoRAConfig, corpus: Corpus, generators: Mapping[str, Generator], shot: int, seed: int
) -> tuple[dict[str, Row], dict[str, Any]]:
    """Judges every row on the unseen tasks; returns what was chosen on validation tasks, too."""
    unseen, validation = (
        AdapterRows(corpus, "unseen", shot, seed, config.draws),
        AdapterRows(corpus, "validation", shot, seed),
    )
    shared = generators["shared"]
    assert isinstance(shared, SharedNetwork)
    pooling = max(POOLINGS, key=lambda name: validation.head(name).percent)
    rows = {"head": unseen.head(pooling)}
    chosen: dict[str, Any] = {"pooling": pooling}
    stored_ND, _ = unseen.stored()
    strength = max(STRENGTHS, key=lambda one: validation.regression(one).percent)
    rows["average"] = unseen.one_for_all(stored_ND.mean(dim=0))
    rows["nearest"], rows["nearest_text"] = unseen.nearest_by_loss(), unseen.nearest_by_text()
    rows["regression"] = unseen.regression(strength)
    for name, start_D in _starts(config, corpus, unseen, seed).items():
        tried = validation.gradient(start_D, config.rates, config.steps)
        rate, steps = max(tried, key=lambda key: tried[key].percent)
        rows[name] = unseen.gradient(start_D, [rate], [steps])[rate, steps]
        chosen[name] = {"rate": rate, "steps": steps}
        if name == _FROM_META:
            rows["start"] = unseen.one_for_all(start_D)
    rows["gradient_all"] = unseen.trained_on_all()
    rows["shared"] = unseen.one_for_all(shared.network(unseen.layout).detach())
    for name in config.methods:
        rows[name] = unseen.written(generators[name])
        if generators[name].reads_parts:
            rows |= {f"{name}_{reads}": unseen.written(generators[name], reads=reads) for reads in _PARTS}
    best = max(config.methods, key=lambda name: validation.written(generators[name]).percent)
    if len(unseen.tasks) > config.draws:  # A single task has no other to be told.
        rows["shuffled"] = unseen.written(generators[best], shift=config.draws)
    return rows, chosen | {"regression": strength, "shuffled": best}


def _starts(config: LoRAConfig, corpus: Corpus, rows: AdapterRows, seed: int) -> dict[str, Tensor]:
    """Returns what gradient training begins with: the encoder as it is, and the zoo's start where it is trained."""
    (layout_id,) = corpus.networks
    starts = {"gradient": rows.layout.flatten(initial_state(rows.recipe, seed))}
    if config.zoo_of(seed).start == "meta":
        base_D = corpus.base_values(layout_id)
        assert base_D is not None, "networks share their start"
        starts[_FROM_META] = base_D
    return starts


def _spreads(rows: Mapping[str, Row]) -> dict[str, Any]:
    """Returns standard errors, paired differences with those of their means, and what the errors are over."""
    differences = {}
    for name in rows:
        for other in _BESIDE:
            if name != other and (name.startswith(METHODS) or name in ("shared", "shuffled", _FROM_META)):
                gain = rows[name].minus(rows[other])
                differences[f"{name} - {other}"] = [round(gain.percent, 2), round(gain.error, 2)]
    errors = {name: round(row.error, 2) for name, row in rows.items()}
    over = "tasks" if len(rows["head"].accuracy_TJ) > 1 else "draws of one task"
    return {"standard_errors": errors, "paired_differences": differences, "errors_over": over}


def _print(shot: int, rows: Mapping[str, Row]) -> None:
    table = Table(f"{shot} examples a class", "accuracy", "±", "ms an adapter")
    for name, row in rows.items():
        table.add_row(name, f"{row.percent:.1f}", f"{row.error:.1f}", f"{row.milliseconds:.1f}")
    Console().print(table)
