"""The command `raywgen plan`: what a run would take, before anything of it runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from raywgen.cli.settings import Overrides, TrainedBy, Trust, out, split_config
from raywgen.config import load_config
from raywgen.progress import plain
from raywgen.trust import named_in, trusting

if TYPE_CHECKING:
    from raywgen.training.plan import Plan, PlannedTokens

_PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimiser state",
    "averages": "averages (EMA)",
    "buffers": "exchange of gradients",
    "activations": "activations",
    "batches": "batches",
    "offloaded": "offloaded to the host",
    "checkpoint": "copies for a checkpoint",
    "process": "process",
}


def plan(
    config: TrainedBy = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    trust: Trust = None,
) -> None:
    """Say what a run would take before it runs: sizes, memory, strategy, hours, price.

    raywgen plan configs/igpg/vit-l.yaml layout=vit-l nodes=4 gpus_per_node=8 gpu_memory=80GiB memory=512GiB

    raywgen plan igpg corpus=runs/zoo/corpus num_workers=2 measure=true price_per_node_hour=3.5

    CONFIG and KEY=VALUE are those of `raywgen train`; the further settings below say what is planned for. The corpus
    need not be there yet: `layout=` names the architecture of its networks, or its manifest alone is enough. Nodes
    given by hand come before those of RAY_ADDRESS and these before this machine. Every stage's step is run once
    on tensors without values, so that a plan for any size takes seconds and no memory. Hours follow from
    `seconds_per_step=`, or from `measure=true`, which trains a few steps here. The exit status is 1, with the reason
    and the nearest settings that fit, where the run cannot be trained. Where networks are written as tokens, a second
    table says what each number of levels keeps and costs.
    """
    from raywgen.training import load_train_config
    from raywgen.training.plan import PlanConfig, make_plan, split_overrides
    from raywgen.training.strategy import DoesNotFitError

    path, rest = split_config(config, overrides)
    own, of_run = split_overrides(rest)
    settings, planned_for = load_train_config(path, of_run), load_config(PlanConfig, None, own)
    with trusting(*named_in(settings), *named_in(planned_for)):
        made = make_plan(settings, planned_for)
    if as_json:
        print(json.dumps(made.to_json()))
    else:
        _print(made)
    if made.refusals:
        raise DoesNotFitError("; ".join(made.refusals))


def _print(made: Plan) -> None:
    stages = made.stages
    table = Table("", *(plain(stage.shape.name) for stage in stages), title=f"{made.config.method}, stage by stage")
    for name, cells in _rows(made):
        table.add_row(name, *cells)
    out.print(table)
    if made.generator.tokens is not None:
        out.print(_tokens(made.generator.tokens, made))
    for line in _lines(made):
        out.print(plain(line), highlight=False, soft_wrap=True)


def _tokens(tokens: PlannedTokens, made: Plan) -> Table:
    """Shows what each number of levels keeps and costs; the run's own is marked."""
    largest = made.corpus.largest
    title = f"A network of {largest.num_values:,} values as tokens: what published ones keep, and what it costs"
    columns = ("levels", "bits a value", "signal to noise, dB", "points of accuracy lost", "tokens", "seconds to write")
    memory = f"about {_gib(tokens.windows_bytes)} GiB beside the generator, which takes {_gib(_bundle(made))}"
    table = Table(*columns, title=title, caption=f"Memory to write it, by pieces on a CPU: {memory}.")
    rate = None if made.hours is None else made.hours.values_per_second
    for row in tokens.rows:
        is_own = row.num_levels == tokens.num_levels
        kept = ("-", "-") if row.kept is None else (f"{row.kept.snr_db:.1f}", f"{row.kept.points_lost:.1f}")
        seconds = f"{largest.num_values / rate:,.3g}" if rate and is_own else "-"
        levels = f"{row.num_levels}{', as set' * is_own}"
        table.add_row(levels, f"{row.bits_per_value:.2f}", *kept, f"{row.num_tokens:,}", seconds)
    return table


def _rows(made: Plan) -> Iterator[tuple[str, list[str]]]:
    stages = made.stages
    yield "parameters", [f"{stage.shape.sizes.num_parameters:,}" for stage in stages]
    yield "steps", [f"{stage.shape.num_steps:,}" for stage in stages]
    yield (
        "networks a step, of a worker",
        [
            f"{size:,}, {-(-size // max(1, stage.choice.num_workers)):,}"
            for stage in stages
            for size in [stage.shape.sizes.batch_size]
        ],
    )
    yield "a network is seen as", ["whole" if stage.shape.whole_networks else "a window" for stage in stages]
    yield "values a step", [f"{stage.shape.num_values:,}" for stage in stages]
    yield "tokens a step", [f"{stage.shape.num_tokens:,}" if stage.shape.num_tokens else "-" for stage in stages]
    yield "settings", [stage.choice.settings() for stage in stages]
    for key, name in _PARTS.items():
        amounts = [getattr(stage.bytes, key) for stage in stages]
        if any(amounts):
            yield f"{name}, GiB", [_gib(amount) for amount in amounts]
    on_gpu = made.config.device == "cuda"
    yield f"peak of a worker{' on its GPU' * on_gpu}, GiB", [_gib(stage.bytes.device) for stage in stages]
    if on_gpu:
        yield "peak of its share of the node, GiB", [_gib(stage.bytes.host) for stage in stages]
    yield "memory that it has, GiB", [_gib(stage.memory) if stage.memory else "unknown" for stage in stages]
    yield "fits", ["unknown" if stage.memory is None else "no" if stage.refusal else "yes" for stage in stages]
    if made.hours is not None:
        seconds = made.hours.seconds
        yield "seconds a step", [f"{seconds[stage.shape.name].step:.3g}" for stage in stages]


def _lines(made: Plan) -> Iterator[str]:
    corpus, nodes = made.corpus, made.nodes
    yield f"generator: {made.generator.num_parameters:,} parameters"
    count, size = corpus.num_networks, _gib(corpus.num_bytes)
    number = f"{count:,} networks, {size} GiB" if count else "of unknown size"
    yield f"corpus: {corpus.name}, {number}, largest network {corpus.largest.num_values:,} values"
    yield f"a checkpoint: {_gib(made.checkpoint_bytes)} GiB; the generator alone {_gib(_bundle(made))} GiB"
    yield f"nodes: {nodes.describe()}"
    objects = sum(node.object_bytes for node in nodes.nodes)
    used = f"batches take at most {_gib(made.object_bytes)}" if made.object_bytes else "workers map the corpus"
    yield f"object store: Ray sets {_gib(objects)} GiB of the nodes aside; {used}"
    for stage in made.stages:
        if stage.reason:
            yield f"strategy of '{stage.shape.name}': {stage.choice.settings()}, because {stage.reason}"
    if made.hours is not None:
        price = f", price {made.hours.price:,.2f}" if made.hours.price else ""
        how = "measured here" if made.hours.is_measured else "as given"
        yield f"time: {made.hours.hours:,.3g} hours, {made.hours.node_hours:,.3g} node hours{price}, from steps {how}"
        if rate := made.hours.values_per_second:
            seconds = corpus.largest.num_values / rate
            yield f"generation: {rate:,.3g} values a second here, {seconds:,.3g} s for the largest network"
    else:
        yield "time: give seconds_per_step=, or measure=true on a machine like those that train"
    for sentence in made.assumptions():
        yield f"assumed: {sentence}"


def _bundle(made: Plan) -> int:
    return 4 * made.generator.num_parameters + made.generator.buffer_bytes


def _gib(amount: Any) -> str:
    return f"{amount / 2**30:,.3g}"
