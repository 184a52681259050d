"""The `raywgen` command: parses, calls, prints."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer
from rich.table import Table

from raywgen.cli.cluster import app as cluster_app
from raywgen.cli.corpus_encode import app as corpus_app
from raywgen.cli.early import check_corpus, check_named
from raywgen.cli.encoder import app as encoder_app
from raywgen.cli.failures import is_one_line, line_of, print_aside, print_warning
from raywgen.cli.job import app as job_app
from raywgen.cli.job import run_status_command
from raywgen.cli.plan import plan
from raywgen.cli.settings import (
    Config,
    Overrides,
    SettingsCommand,
    Shipped,
    TrainedBy,
    Trust,
    out,
    print_info,
    print_networks,
    print_page,
    split_config,
    versions,
)
from raywgen.cli.tune import tune
from raywgen.cli.use import app as use_app
from raywgen.config import given_once, load_config, shipped_config, shipped_configs
from raywgen.progress import Reporter, plain
from raywgen.stops import Stopped, stop_signals
from raywgen.trust import beside, named_in, trusting

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
zoo_app = typer.Typer(no_args_is_help=True, help="Train many small networks on real tasks, straight into a corpus.")
app.add_typer(zoo_app, name="zoo")
app.add_typer(corpus_app, name="corpus")
app.add_typer(encoder_app, name="encoder")
app.add_typer(job_app, name="job")
app.add_typer(cluster_app, name="cluster")
app.add_typer(use_app)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        out.print(versions(), highlight=False, soft_wrap=True)
        raise typer.Exit


@app.callback()
def raywgen(
    is_version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the versions of all that counts."
        ),
    ] = False,
) -> None:
    """Train generators of neural-network weights on a Ray cluster, and put them to use."""


def main() -> None:
    """Runs the command. A user's mistake gives one line and exit status 1; a signal one line and its own status."""
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.showwarning = print_warning
    try:
        # `module:Class` may name a file in the current folder.
        with stop_signals(), beside(os.getcwd()):
            app(prog_name="raywgen")
    except Stopped as stopped:
        print_aside(f"[bold]{plain(str(stopped))}[/bold]")
        sys.exit(stopped.code)
    except Exception as error:
        if not is_one_line(error):
            raise
        print_aside(f"[bold red]error:[/bold red] {plain(line_of(error))}")
        sys.exit(1)


@app.command(cls=SettingsCommand)
def demo(overrides: Overrides = None) -> None:
    """Run everything once, offline, on two cores, in about five minutes.

    It trains a zoo on digits, generators on the zoo, generates networks, scores them, and writes a report. If it was
    interrupted, run it again to continue. For instance:

        raywgen demo out=runs/demo seed=1

        raywgen demo out=runs/plain igpg.task_loss.num_steps=0
    """
    from raywgen.benchmarks.demo import DemoConfig, run_demo
    from raywgen.evaluation.tables import print_evaluation

    _, rest = split_config(None, overrides)
    config = load_config(DemoConfig, None, rest)
    result = run_demo(config, Reporter())
    print_evaluation(result, out)
    out.print(f"\n[bold]{plain(config.out)}[/bold] holds everything:", highlight=False, soft_wrap=True)
    for name, path in result.paths.items():
        out.print(f"  {name:<13} {plain(config.out)}/{path}", highlight=False, soft_wrap=True)


@zoo_app.command("train", cls=SettingsCommand)
def zoo_train(config: Shipped = None, overrides: Overrides = None, trust: Trust = None) -> None:
    """Train a zoo and write it as a corpus, for instance `raywgen zoo train digits seed=1`.

    CONFIG is a YAML file or a shipped recipe; `raywgen zoo list` names them. Your own network: `networks=[{name:
    package.module:Class}]`; your own data: `tasks.kind=images tasks.path=images.parquet`. If it was interrupted, run it
    again to continue.
    """
    from raywgen.training.session import ray_session
    from raywgen.zoo import ZooConfig, train_zoo

    path, rest = split_config(config, overrides)
    settings = load_config(ZooConfig, shipped_config("zoo", path), rest)
    with Reporter().step("zoo", f"train networks into {settings.out}") as bar:
        corpus = train_zoo(
            settings,
            settings.out,
            bar.update,
            lambda line: out.print(f"  {plain(line)}", highlight=False),
            session=ray_session,
        )
    print_info(corpus.info())


@zoo_app.command("list")
def zoo_list() -> None:
    """List the shipped recipes and the networks that each trains."""
    table = Table("recipe", "what it makes")
    for path in shipped_configs("zoo"):
        table.add_row(path.stem, plain(path.read_text().splitlines()[0].lstrip("# ")))
    out.print(table)


@app.command(cls=SettingsCommand)
def train(config: TrainedBy = None, overrides: Overrides = None, trust: Trust = None) -> None:
    """Train a generator on a corpus.

    raywgen train igpg/digits out=runs/mine seed=1

    Or a method by its name, as in `raywgen train mcdi corpus=runs/zoo/omniglot-heads shot=1`. `num_workers=0` trains in
    this process. The same command again continues an interrupted run. For a generator that writes tokens it also prints
    the size and the fidelity of the tokens, and writes them to `tokenizer.json`.
    """
    path, rest = split_config(config, overrides)
    check_named("train", path, rest)

    from raywgen.evaluation.tables import print_tokenizer
    from raywgen.evaluation.tokenizer_report import report_run
    from raywgen.training import load_train_config
    from raywgen.training.run import run_training

    settings = load_train_config(path, rest)
    with trusting(*named_in(settings)):
        with Reporter().step("train", f"{settings.method} into {settings.out}") as bar:
            run_training(settings, bar.training)
        if (report := report_run(settings.out)) is not None:
            print_tokenizer(report, out)
    folder = plain(settings.out)
    out.print(
        f"{folder}/generator holds the generator; curves: tensorboard --logdir {folder}",
        highlight=False,
        soft_wrap=True,
    )
    print_page(settings.out)


@app.command(cls=SettingsCommand)
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run folder of `raywgen train`.")],
    overrides: Overrides = None,
    trust: Trust = None,
) -> None:
    """Make a generator out of a checkpoint of a run, also while the run goes on.

    raywgen export runs/mine out=generators/mine

    raywgen export runs/mine stage=prior

    `raywgen.load` reads what it makes. It takes the newest checkpoint, of all or of a stage, or the one that
    `checkpoint=` names, and reads it tensor by tensor: it needs no GPU, and no memory for the whole generator. Averages
    of the parameters are used where a stage keeps them.
    """
    from raywgen.training.export_run import ExportConfig, export_run

    folder = export_run(run, load_config(ExportConfig, None, overrides or []))
    out.print(f"{plain(str(folder))} holds the generator", highlight=False, soft_wrap=True)


@app.command(cls=SettingsCommand)
def generate(
    config: Config = None,
    overrides: Overrides = None,
    where: Annotated[str | None, typer.Option(help="`here`, or `ray`: over actors; short for where=.")] = None,
    into: Annotated[
        str | None,
        typer.Option(help="`files`, `adapters` (PEFT folders), or `corpus` (Arrow shards); short for into=."),
    ] = None,
    num: Annotated[int | None, typer.Option(help="Networks for each task and architecture; short for num=.")] = None,
    trust: Trust = None,
) -> None:
    """Write networks as `.safetensors` or a corpus, for tasks of a corpus or your own.

    raywgen generate generator=runs/demo/igpg corpus=runs/demo/corpus tasks=unseen out=networks

    raywgen generate ... instruction="Is the digit one of 1, 4 or 7?" data=examples.npz

    raywgen generate ... networks='[[64, 20, 2], {name: "mynets:MyNet", width: 16}]'

    raywgen generate ... out=runs/generated --num 1000 --into corpus --where ray

    The third command writes architectures that the generator may never have seen, with a warning. The last one writes
    a thousand networks for each task and architecture over all cores and nodes. If it was interrupted, run it again.
    A network of more than `piece_values` values that is not tried on samples (try_on_samples=false) is generated in
    pieces, which any number of actors write into one file.
    If the corpus has no tasks, the condition of each network is the name of its architecture, and nothing is judged.
    """
    path, rest = split_config(config, overrides)
    rest += [f"{key}={value}" for key, value in (("where", where), ("into", into), ("num", num)) if value is not None]
    check_named("generate", path, rest, ("corpus", "generator"))

    from raywgen.generation import GenerateConfig
    from raywgen.generation import generate as write
    from raywgen.training.session import ray_session

    settings = load_config(GenerateConfig, path, rest)
    with Reporter().step("generate", f"networks into {settings.out}") as bar:
        rows = write(settings, bar.update, lambda done, total: bar.amount(done, total, "values"), session=ray_session)
    print_networks(rows, were_to_be_tried=settings.try_on_samples)
    print_page(settings.out)


@app.command(cls=SettingsCommand)
def adapt(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="Run folder or bundle of a trained generator.")],
    support: Annotated[str, typer.Option(help="Labelled examples: Parquet, folder of class folders, or `.npz`.")],
    overrides: Overrides = None,
    trust: Trust = None,
) -> None:
    """Write weights for a new task from labelled examples, in milliseconds, without gradients.

    Of heads it makes several, of which the generator writes one, and keeps the best on the examples.

    raywgen adapt runs/mcdi --support examples/ out=head.safetensors

    raywgen adapt runs/igpg-sentence-lora --support examples.parquet test=others.parquet out=adapter
    """
    check_named("adapt", None, [f"generator={bundle}", *(overrides or [])], ("generator",))

    from raywgen.generation import AdaptConfig
    from raywgen.generation import adapt as write

    settings = load_config(
        AdaptConfig, None, given_once([f"generator={bundle}", f"support={support}", *(overrides or [])])
    )
    found = write(settings)
    encoded = f"{found.encode_ms:.1f} ms to encode them, " if found.encode_ms else ""
    of_classes = f" for {len(found.classes)} classes" if found.classes else ""
    out.print(
        f"{plain(str(found.path))}: {found.num_values:,} values{of_classes} from "
        f"{found.num_examples} examples; {encoded}{found.generate_ms:.1f} ms to generate",
        highlight=False,
        soft_wrap=True,
    )
    for line in found.heads:
        out.print(plain(line), highlight=False, soft_wrap=True)
    if found.on_examples is not None:
        left_out = ", each left out in turn" if found.head_alone is not None or found.heads else ""
        out.print(
            f"on these examples{left_out}: {plain(found.on_examples.sentence())}", highlight=False, soft_wrap=True
        )
    for name, judged in (
        ("a head on the encoder as it is", found.head_alone),
        ("on the test sentences", found.on_test),
        ("a head on the encoder as it is, on the test sentences", found.head_alone_on_test),
        ("next words of these examples, which it has read", found.next_word),
        ("next words of the test texts", found.next_word_on_test),
    ):
        if judged is not None:
            out.print(f"{name}: {plain(judged.sentence())}", highlight=False, soft_wrap=True)


@app.command(cls=SettingsCommand)
def evaluate(config: Config = None, overrides: Overrides = None, trust: Trust = None) -> None:
    """Score a generator: ladder, baselines at equal budget, novelty, verdict.

    raywgen evaluate generator=runs/demo/igpg corpus=runs/demo/corpus out=runs/demo/evaluation
    """
    path, rest = split_config(config, overrides)
    check_named("evaluate", path, rest, ("corpus", "generator"))

    from raywgen.evaluation.config import EvaluateConfig
    from raywgen.evaluation.evaluate import evaluate as score
    from raywgen.evaluation.tables import print_evaluation

    settings = load_config(EvaluateConfig, path, rest)
    with Reporter().step("evaluate", settings.generator) as bar:
        result = score(settings, bar.named)
    print_evaluation(result, out)
    print_page(settings.out)


@app.command()
def score(
    weights: Annotated[str, typer.Argument(help="A `.safetensors` or `.pt` file; pickled code is never executed.")],
    corpus: Annotated[str, typer.Option(help="The corpus that knows task and architecture.", callback=check_corpus)],
    task: Annotated[str, typer.Option(help="A task id, for instance `digits/1-4-7`.")],
    trust: Trust = None,
) -> None:
    """Score one weights file on a task's test samples.

    raywgen score mine.safetensors --corpus runs/demo/corpus --task digits/1-4-7

    The figure is that of `raywgen generate` and `raywgen evaluate`, so that your own network stands beside theirs.
    """
    from raywgen.corpus import Corpus
    from raywgen.evaluation.score import score_file

    found = score_file(weights, Corpus.open(corpus), task)
    out.print(
        f"{plain(found.network)} on {plain(task)}: balanced accuracy {100 * found.accuracy:.1f}, "
        f"loss {found.loss:.3f}, {found.num_test_samples} test samples",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="The `out` of demo, evaluate, train, tune, finetune or generate.")],
) -> None:
    """Draw the self-contained HTML page on what a command left in its folder; the command drew it at its end."""
    from raywgen.evaluation.report import PAGES, write_report
    from raywgen.tuning.report import PAGES as SEARCHES

    out.print(f"page: {plain(write_report(run, {**SEARCHES, **PAGES}))}", highlight=False, soft_wrap=True)


# Added here, so that help lists them after the commands that users need first.
app.command("status")(run_status_command)
app.command(cls=SettingsCommand)(plan)
app.command(cls=SettingsCommand)(tune)
