"""The commands `raywgen retrieve`, `select`, `finetune` and `statistics` put networks to use for a task of your own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer
from rich.table import Table

from raywgen.cli.early import check_named
from raywgen.cli.settings import Config, Overrides, SettingsCommand, Trust, out, print_page, split_config
from raywgen.config import given_once, load_config
from raywgen.progress import Reporter, plain

app = typer.Typer()
Corpus_ = Annotated[str, typer.Argument(metavar="CORPUS", help="A corpus: local path or URI.")]


@app.command(cls=SettingsCommand)
def retrieve(corpus: Corpus_, overrides: Overrides = None, trust: Trust = None) -> None:
    """Find the stored networks nearest to a task.

    By `data` alone these are the networks of the lowest loss on the labelled samples; with an instruction those whose
    tasks are most similar.

    raywgen retrieve runs/zoo/corpus data=examples.npz out=nearest.safetensors

    raywgen retrieve runs/zoo/corpus instruction="Is the digit one of 0 or 6?" 'where=[architecture=mlp-64-14-2]'
    """
    given = given_once([f"corpus={corpus}", *(overrides or [])])
    check_named("retrieve", None, given)

    from raywgen.evaluation.retrieve import RetrieveConfig
    from raywgen.evaluation.retrieve import retrieve as find

    settings = load_config(RetrieveConfig, None, given)
    with Reporter().step("retrieve", f"networks of {corpus}") as bar:
        found = find(settings, bar.named)
    columns = ("network", "trained for", "loss", "accuracy", "similarity of text", "of data", "its own test accuracy")
    rows = [
        (
            one.checkpoint_id,
            one.instruction or one.task_id or "-",
            _number(one.loss, 3),
            _percent(one.accuracy),
            _number(one.text_similarity, 2),
            _number(one.data_similarity, 2),
            _percent(one.test_accuracy),
        )
        for one in found.networks
    ]
    _print(f"{found.num_tried} networks, nearest first by {found.by}", columns, rows)
    for sentence in found.left_out:
        out.print(f"[yellow]left out:[/yellow] {plain(sentence)}", highlight=False, soft_wrap=True)
    if settings.out:
        first = plain(found.networks[0].checkpoint_id)
        out.print(f"{settings.out} holds {first}; a .json beside it lists all", highlight=False, soft_wrap=True)


@app.command(cls=SettingsCommand)
def select(corpus: Corpus_, overrides: Overrides = None, trust: Trust = None) -> None:
    """Rank architectures for a task, and measure such a ranking on held-out tasks.

    raywgen select runs/zoo/corpus data=examples.npz

    raywgen select runs/zoo/corpus data=examples.npz instruction="Is the digit one of 0 or 6?" generator=runs/igpg
    """
    given = given_once([f"corpus={corpus}", *(overrides or [])])
    check_named("select", None, given)

    from raywgen.evaluation.select import SelectConfig
    from raywgen.evaluation.select import select as rank

    settings = load_config(SelectConfig, None, given)
    with Reporter().step("select", f"an architecture by {corpus}") as bar:
        selected = rank(settings, bar.named)
    columns = ("architecture", "values", "predicted accuracy", "mean over tasks", "loss as generated")
    rows = [
        (
            one.architecture,
            f"{one.num_values:,}",
            _percent(one.predicted),
            _percent(one.mean),
            _number(None if one.generated is None else -one.generated, 3),
        )
        for one in selected.candidates
    ]
    _print(f"Best first, by {selected.by}", columns, rows)
    columns = ("ranking by", "rank correlation", "above the mean's", "accuracy lost by its choice", "tasks")
    rows = [
        (
            one.answer,
            f"{one.spearman:.2f} ±{one.half_width:.2f}",
            "-" if one.answer == "mean" else f"{one.over_mean:+.2f} ±{one.over_mean_half_width:.2f}",
            _percent(one.lost_accuracy),
            str(one.num_tasks),
        )
        for one in selected.trust
    ]
    _print(f"What such a ranking is worth: {selected.heldout}", columns, rows)


@app.command(cls=SettingsCommand)
def statistics(
    weights: Annotated[str, typer.Argument(metavar="WEIGHTS", help="A file of weights, or a folder of several.")],
    overrides: Overrides = None,
    trust: Trust = None,
) -> None:
    """Estimate statistics of batch normalisation of a stored network, from unlabelled images.

    raywgen statistics resnet101.safetensors network=resnet101 data=images/ size=224

    raywgen statistics net.safetensors 'network={name: cifar-resnet, depth: 20}' data=images.parquet out=net.safetensors

    raywgen statistics folder/ network=mynets:MyNet data=images.npz num=2048 batch_size=32 device=cuda

    Weights that were generated, averaged or quantised give other activations than their running means and variances
    describe; where a network answers at chance, this is the first thing to try. Images are drawn at random, run batch
    by batch, and need no labels. They must be standardised as in training: give `mean=` and `std=`.

    The result is a new file (or folder) beside the network, `NAME-statistics`; `out=` names another, and the network's
    own path replaces it. All other tensors, dtypes, metadata and the cut into files stay bit for bit; a torch file
    becomes `.safetensors`.
    """
    from raywgen.generation.file_statistics import StatisticsConfig, estimate_file_statistics

    settings = load_config(StatisticsConfig, None, given_once([f"weights={weights}", *(overrides or [])]))
    reporter = Reporter()
    with reporter.step("statistics", f"{weights} on {settings.data}") as bar:
        found = estimate_file_statistics(
            settings,
            lambda done, total: bar.named(done, total, f"{done}/{total} images decoded"),
            lambda done, total: bar.amount(done, total, "images"),
        )
    shape = "x".join(map(str, found.image_shape))
    lines = [
        f"{found.path}: new statistics of {found.num_layers} layers, {found.num_channels:,} channels, of "
        f"{found.network}, from {found.num_images:,} inputs of {shape}",
        f"medians over channels: means moved by {found.mean_shift:.2g} standard deviations, most before "
        f"{found.furthest} ({found.furthest_shift:.2g}), variances by a factor of {found.variance_ratio:.3g}",
        *found.notes,
    ]
    if found.mean and not settings.mean:
        mean, std = ([round(value, 4) for value in part] for part in (found.mean, found.std))
        lines.append(
            f"pixels were standardised by their own mean {mean} and std {std}; give mean= and std= if the network was "
            "trained with others"
        )
    for line in lines:
        out.print(plain(line), highlight=False, soft_wrap=True)


@app.command(cls=SettingsCommand)
def finetune(config: Config = None, overrides: Overrides = None, trust: Trust = None) -> None:
    """Fine-tune networks of several starts under equal settings, and count epochs.

    raywgen finetune generator=runs/demo/igpg corpus=runs/demo/corpus tasks=unseen epochs=25

    raywgen finetune corpus=runs/demo/corpus tasks=digits/0-1 network=mlp-64-14-2 'start=[random,mine.safetensors]'
    """
    path, rest = split_config(config, overrides)
    check_named("finetune", path, rest)

    from raywgen.evaluation.finetune import FinetuneConfig
    from raywgen.evaluation.finetune import finetune as train

    settings = load_config(FinetuneConfig, path, rest)
    with Reporter().step("finetune", f"from {', '.join(settings.start)}") as bar:
        tuned = train(settings, bar.named)
    shown = sorted({epoch for epoch in (0, 1, 5, 25, settings.epochs) if epoch <= settings.epochs})
    columns = ["network", "start", "rate", *(f"after {epoch}" for epoch in shown), "epochs to"]
    rows = [
        (
            row.network,
            row.start,
            f"{row.learning_rate:g}",
            *(_percent(row.accuracy[epoch]) for epoch in shown),
            f"{_percent(row.wanted_accuracy)}: {'never' if row.epochs is None else round(row.epochs)}",
        )
        for row in tuned
    ]
    _print("Balanced test accuracy after so many epochs, mean over tasks; epochs: median", columns, rows)
    folder = plain(settings.out)
    out.print(f"{folder} holds all curves (finetune.json) and the trained networks", highlight=False, soft_wrap=True)
    print_page(settings.out)


def _print(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table without its empty columns."""
    filled = [place for place in range(len(columns)) if any(row[place] != "-" for row in rows)]
    if not rows:
        out.print(title)
        return
    table = Table(*(columns[place] for place in filled), title=title, title_justify="left")
    for row in rows:
        table.add_row(*(plain(row[place]) for place in filled))
    out.print(table)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
