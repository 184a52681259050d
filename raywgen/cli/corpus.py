"""The commands `raywgen corpus ...` build, describe, show, check, export, split, merge, align and compress corpora."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from raywgen.cli.early import check_corpus
from raywgen.cli.settings import Trust, out, print_info
from raywgen.out_folder import checked_out, local_out
from raywgen.progress import Reporter, plain
from raywgen.stops import keeping

app = typer.Typer(no_args_is_help=True, help="Build corpora of weights, look at them, check and cut them.")
Path_ = Annotated[str, typer.Argument(metavar="CORPUS", help="A corpus: local path or URI.", callback=check_corpus)]


def _checked(target: str) -> str:
    """Refuses a folder that nobody meant before a corpus is opened, or Ray started."""
    return checked_out(target, "runs/corpus")


def _checked_local(folder: str) -> str:
    return local_out(folder, "runs/export", "raywgen corpus export")


Out = Annotated[
    str,
    typer.Argument(
        metavar="OUT", help="Folder of the new corpus: local path or URI.", callback=_checked, is_eager=True
    ),
]
Query = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[FACT=VALUE]...",
        help="For instance architecture=resnet20 'test_accuracy>0.9' 'checkpoint_id~runs/*' 'val acc>0.9'. Names with "
        "one of =<>!~ and values with a comma stand in double quotes: '\"p(y=1)\">0.5' 'group=\"a,b\"'.",
    ),
]
AsText = Annotated[
    list[str] | None,
    typer.Option(help="A fact of your own that becomes text, where sources differ in its type; may be repeated."),
]


@app.command()
def build(
    target: Out,
    sources: Annotated[
        list[str],
        typer.Option("--from", help="Folder, file, glob, model folder, zoo of runs, hub name; may be repeated."),
    ],
    facts: Annotated[
        str, typer.Option(help="CSV, TSV, JSON, JSONL or Parquet: column `path` (name, file or pattern) and facts.")
    ] = "",
    strict_facts: Annotated[
        bool, typer.Option("--strict-facts", help="A row of facts that fits nothing or is ambiguous ends the ingest.")
    ] = False,
    as_text: AsText = None,
    select: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            help="Which networks of files that hold several: a key, a pattern, '*' for each; may be repeated.",
        ),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="A refused checkpoint ends the ingest.")] = False,
    constant: Annotated[
        list[str] | None,
        typer.Option(help="Tensors that the architecture fixes, finite or not, by name or pattern; may be repeated."),
    ] = None,
    here: Annotated[bool, typer.Option("--here", help="Work in this process, without Ray.")] = False,
) -> None:
    """Ingest checkpoints of any kind into a corpus, over all cores and nodes.

    raywgen corpus build runs/corpus --from ~/checkpoints --from 'nets/*.pt' --facts facts.csv

    Pickled code is never executed. Checkpoints that cannot be read or are not finite are set aside with the reason. If
    it was interrupted, run it again to continue; readers never see half a corpus.
    """
    from raywgen.corpus.build import BuildConfig, build_corpus
    from raywgen.training.session import ray_session

    config = BuildConfig(
        out=target,
        sources=sources,
        facts=facts,
        strict_facts=strict_facts,
        as_text=as_text or [],
        select=select or [],
        strict=strict,
        constants=constant or [],
        distributed=not here,
    )
    kept = keeping(f"{target} keeps the files that are ingested; the same command goes on with the others")
    with kept, Reporter().step("corpus", f"ingest into {target}") as bar:
        corpus = build_corpus(
            config, lambda done, total, what: bar.amount(done, total, "bytes", what), bar.say, session=ray_session
        )
    print_info(corpus.info())
    _print_aside(
        corpus.quarantine.to_pylist(), corpus.manifest["recipe"].get("others", {}), f"{target}/quarantine.parquet"
    )


def _print_aside(rows: list[dict[str, str]], others: dict[str, int], table: str) -> None:
    """Names the first refused checkpoints, and counts all that did not come in by reason."""
    from raywgen.corpus.aside import counts_by_reason, in_one_line, is_refused

    refused = [row for row in rows if is_refused(row)]
    for row in refused[:10]:
        out.print(f"[yellow]set aside[/yellow] {plain(in_one_line(row))}", highlight=False, soft_wrap=True)
    if len(rows) > len(refused[:10]):
        for reason, count in counts_by_reason(rows):
            out.print(f"{count} {plain(reason)}", highlight=False, soft_wrap=True)
        out.print(f"each is named in {table}", highlight=False, soft_wrap=True)
    if others:
        counted = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in others.items())
        out.print(f"files that hold no weights: {plain(counted)}", highlight=False, soft_wrap=True)


@app.command()
def describe(
    path: Path_,
    file: Annotated[str, typer.Argument(metavar="[FILE]", help="YAML with `tasks:` and `networks:`.")] = "",
    trust: Trust = None,
) -> None:
    """Describe in place what imported checkpoints do and how they are built.

    raywgen corpus describe runs/corpus networks.yaml

    The file holds recipes by name: `tasks: {cifar10: {name: images, path: train.parquet, test_path: test.parquet}}` and
    `networks: {resnet20: {name: cifar-resnet, depth: 20}}`, where a name may be `package.module:Class`. Without a
    description generators see weights alone; with it they get data as condition, can be trained through the task's
    loss, and are judged. Without FILE the command prints a template with the names of the corpus.
    """
    from raywgen.corpus import Corpus
    from raywgen.corpus.describe import template
    from raywgen.zoo.describe import describe_corpus

    if not file:
        typer.echo(template(Corpus.open(path)))
        return
    print_info(describe_corpus(path, file).info())


@app.command()
def info(
    path: Path_,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for scripts.")] = False,
) -> None:
    """Count checkpoints, trajectories, tasks, architectures, values and bytes.

    `steps_of_trajectories` lists the longest runs that were recognised, with their numbers of checkpoints.
    """
    from raywgen.corpus import Corpus

    found = Corpus.open(path).info()
    if as_json:
        typer.echo(json.dumps(found))
    else:
        print_info(found)


@app.command()
def verify(
    path: Path_,
    repair: Annotated[
        bool, typer.Option("--repair", help="Take damaged shards out and put their checkpoints on the quarantine list.")
    ] = False,
) -> None:
    """Check every checksum, length, layout and row count; damaged files are named, and the exit status is 1."""
    from raywgen.corpus import verify_corpus
    from raywgen.corpus.verify import repair_corpus

    with Reporter().step("verify", path) as bar:
        damages = verify_corpus(path, bar.update)
    for damage in damages:
        out.print(f"[red]{plain(damage.file)}[/red] {plain(damage.reason)}", highlight=False, soft_wrap=True)
        for checkpoint_id in damage.checkpoint_ids:
            out.print(f"  holds {plain(checkpoint_id)}", highlight=False, soft_wrap=True)
    if not damages:
        out.print("all whole")
    elif repair:
        corpus = repair_corpus(path, damages)
        out.print(f"repaired: {corpus.facts.num_rows} checkpoints are left, {corpus.quarantine.num_rows} in quarantine")
    else:
        raise typer.Exit(1)


@app.command()
def export(
    path: Path_,
    folder: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER", help="Where the `.safetensors` files go.", callback=_checked_local, is_eager=True
        ),
    ],
    query: Query = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace other files that are there.")] = False,
) -> None:
    """Write checkpoints back as `.safetensors`, bit for bit, in their own dtypes and under their own names.

    The metadata of the original files and the configs of model folders are kept, so `from_pretrained` loads the folder.
    """
    from raywgen.corpus import Corpus
    from raywgen.corpus.export import export as write

    with Reporter().step("export", f"checkpoints into {folder}") as bar:
        written = write(Corpus.open(path), folder, query or [], bar.update, overwrite=overwrite)
    out.print(f"{len(written)} files in {plain(folder)}", highlight=False, soft_wrap=True)


@app.command("filter")
def filter_(path: Path_, target: Out, query: Query = None) -> None:
    """Copy the checkpoints that satisfy all terms into a new corpus; shards without one are never read."""
    from raywgen.corpus import Corpus
    from raywgen.corpus.derive import Selection, write_corpus

    corpus = Corpus.open(path)
    with Reporter().step("filter", f"checkpoints into {target}") as bar:
        part = Selection(corpus=corpus, facts=corpus.query(query or []))
        print_info(write_corpus(target, [part], {"filter": query or []}, bar.update).info())


@app.command()
def merge(
    target: Out,
    paths: Annotated[list[str], typer.Argument(metavar="CORPUS...", help="Corpora to join.")],
    as_text: AsText = None,
) -> None:
    """Join corpora into a new one; if ids clash, those of the later corpus are prefixed with its number.

    A fact that is a number in one corpus and text in another is refused before anything is written; `--as-text FACT`
    converts it to text.
    """
    from raywgen.corpus import Corpus
    from raywgen.corpus.merge import merge as join

    with Reporter().step("merge", f"corpora into {target}") as bar:
        print_info(join(target, [Corpus.open(path) for path in paths], bar.update, as_text=as_text or []).info())


@app.command()
def split(
    path: Path_,
    target: Out,
    by: Annotated[str, typer.Option(help="The fact by which checkpoints are grouped.")] = "trajectory_id",
    heldout: Annotated[float, typer.Option(help="Share of the groups that is held out.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Seed of the choice of groups.")] = 0,
) -> None:
    """Hold out whole groups (trajectories, tasks, architectures) in a new corpus."""
    from raywgen.corpus import Corpus
    from raywgen.corpus.derive import split as cut

    with Reporter().step("split", f"by {by} into {target}") as bar:
        corpus = cut(target, Corpus.open(path), by=by, heldout=heldout, seed=seed, on_progress=bar.update)
    found = corpus.info()
    print_info(found)
    if by == "trajectory_id" and found["trajectories"] == found["checkpoints"]:
        out.print(
            "[yellow]each checkpoint counts as a run of its own[/yellow]: no fact or name says which are steps of one "
            "run. If some are, name runs by a column `trajectory_id` of `corpus build --facts`",
            highlight=False,
            soft_wrap=True,
        )


@app.command()
def dedupe(
    path: Path_,
    target: Out,
    near: Annotated[float, typer.Option(help="Distance, as a share of the norm, that counts as equal.")] = 0.0,
) -> None:
    """Keep the first of equal checkpoints (or of near ones) in a new corpus."""
    from raywgen.corpus import Corpus
    from raywgen.corpus.derive import dedupe as thin

    corpus = Corpus.open(path)
    with Reporter().step("dedupe", f"into {target}") as bar:
        thinned = thin(target, corpus, near=near, on_progress=bar.update)
    out.print(f"{corpus.facts.num_rows - thinned.facts.num_rows} of {corpus.facts.num_rows} checkpoints were doubles")
    print_info(thinned.info())


@app.command()
def align(
    path: Path_,
    target: Out,
    reference: Annotated[
        list[str] | None,
        typer.Option(
            help="Checkpoint id to align to; one for each architecture. Without it the last checkpoint of the first "
            "training trajectory (not a medoid).",
        ),
    ] = None,
    network: Annotated[
        str,
        typer.Option(help="Recipe of the networks where the corpus does not know it: '{name: package.module:Class}'."),
    ] = "",
    input_shape: Annotated[
        str, typer.Option(help="Shape of one input, such as 3,32,32, where the corpus has no tasks.")
    ] = "",
    seed: Annotated[int, typer.Option(help="Seed of the order in which layers are visited.")] = 0,
    trust: Trust = None,
) -> None:
    """Reorder hidden units so that networks from different starts lie close to one reference.

    raywgen corpus align runs/zoo/tiny-mnist runs/zoo/tiny-mnist-aligned

    raywgen corpus align nets aligned --network '{name: cifar-resnet, depth: 20}' --input-shape 3,32,32

    This is weight matching (Git Re-Basin). The function of every network stays the same, and all checkpoints of a
    trajectory are reordered by its last one. It works for any module that can be traced; units that cannot be followed,
    such as those of attention heads, keep their order. Networks that share a start need no alignment and are refused.
    The facts `unaligned_distance` and `aligned_distance` are the distances before and after.
    """
    from raywgen.config import load_config
    from raywgen.corpus import Corpus
    from raywgen.corpus.align import AlignConfig, summary
    from raywgen.corpus.align import align as reorder
    from raywgen.tasks import build_network

    recipe = network if "{" in network else f"{{name: '{network}'}}" if network else "{}"
    config = load_config(AlignConfig, None, [f"network={recipe}", f"input_shape=[{input_shape}]", f"seed={seed}"])
    config.references = reference or []
    corpus = Corpus.open(path)
    with Reporter().step("align", f"into {target}") as bar:
        aligned = reorder(
            target,
            corpus,
            build_network,
            config,
            lambda done, total: bar.named(done, total, f"{done}/{total} trajectories matched"),
            lambda done, total: bar.named(done, total, f"{done}/{total} checkpoints written"),
        )
    print_info(aligned.info())
    for name, count, before, after in summary(aligned):
        out.print(
            f"aligned to {plain(name)}: {count} trajectories, mean distance {before:.3f} -> {after:.3f} of its norm",
            highlight=False,
            soft_wrap=True,
        )


@app.command()
def compress(
    path: Path_,
    target: Annotated[
        str,
        typer.Argument(
            metavar="OUT", help="Folder of the compressed corpus: local path or URI.", callback=_checked, is_eager=True
        ),
    ],
    bits: Annotated[float, typer.Option(help="Most bits per value of each network, everything counted.")] = 4.25,
    min_values: Annotated[
        int, typer.Option(help="Tensors of fewer values, and all of one dimension, get `--small-bits` per value.")
    ] = 1024,
    small_bits: Annotated[int, typer.Option(help="Bits per value of these tensors.")] = 10,
    state_bits: Annotated[
        int, typer.Option(help="Effort of the search, 4 to 16: two more take two to four times longer.")
    ] = 10,
) -> None:
    """Compress a corpus to a few bits per value, with a small loss; `raywgen corpus decompress` restores it.

    raywgen corpus compress runs/corpus runs/corpus-4bit

    At 4.25 bits, an eighth of float32, published networks lose a few tenths of a percentage point of accuracy. Facts,
    tasks, counters and masks do not change. The compressed folder is not a corpus: train on the output of `decompress`.
    """
    from raywgen.corpus import Corpus
    from raywgen.corpus.compression import CodecConfig
    from raywgen.corpus.compression import compress as write

    config = CodecConfig(bits_per_value=bits, min_values=min_values, small_bits=small_bits, state_bits=state_bits)
    with Reporter().step("compress", f"into {target}") as bar:
        done = write(target, Corpus.open(path), config, bar.update)
    out.print(
        f"{done.num_checkpoints} checkpoints: {done.num_bytes:,} bytes of weights became {done.code_bytes:,}, "
        f"{done.bits_per_value:.2f} bits per value",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def decompress(
    path: Annotated[str, typer.Argument(metavar="COMPRESSED", help="What `raywgen corpus compress` wrote.")],
    target: Out,
) -> None:
    """Restore the corpus of a compressed folder, in its original dtypes and under its original names."""
    from raywgen.corpus.compression import decompress as write

    with Reporter().step("decompress", f"into {target}") as bar:
        print_info(write(target, path, bar.update).info())
