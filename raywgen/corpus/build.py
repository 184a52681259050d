"""Builds a corpus from files: ingests items on all cores and nodes, then commits once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from operator import itemgetter

from raywgen.corpus.aside import in_one_line, is_refused
from raywgen.corpus.commit import commit_corpus
from raywgen.corpus.corpus import Corpus
from raywgen.corpus.errors import CorpusError
from raywgen.corpus.fact_types import one_type_each
from raywgen.corpus.facts import NetworkFacts
from raywgen.corpus.facts_file import read_facts
from raywgen.corpus.facts_join import FactsReport, join_facts
from raywgen.corpus.ingest import IngestItem, IngestResult, ingest_item, journal, plan_items, read_journal
from raywgen.corpus.manifest import MANIFEST
from raywgen.corpus.network_names import network_names
from raywgen.corpus.room import check_corpus_room
from raywgen.corpus.runs import join_runs
from raywgen.corpus.sources import SourceCheckpoint, find_checkpoints
from raywgen.corpus.statistics import Statistics, add_statistics
from raywgen.corpus.storage import CorpusStorage
from raywgen.corpus.writing import JOURNALS, remove_unused_shards, writing
from raywgen.json_types import JsonObject
from raywgen.locations import absolute
from raywgen.out_folder import checked_out
from raywgen.weights import Layout

OnBytes = Callable[[int, int, str], None]
"""Called with the bytes read, the bytes of all files, and a line of counts."""
_SHOWN_PROBLEMS = 20


@dataclass(kw_only=True)
class BuildConfig:
    """Settings of an ingest.

    Attributes:
        out: Path or URI of the corpus, which all nodes reach.
        sources: Folders, files, globs, model or adapter folders, zoos of runs, hub names.
        facts: CSV, TSV, JSON, JSON lines or Parquet with a column `path` (a name or pattern) and facts.
        strict_facts: Whether a row of `facts` that fits no checkpoint or several, or contradicts another, is an error.
        as_text: Facts of your own to convert to text, for instance if sources hold them as numbers and as text.
        select: Keys of the networks to take from files that hold several: `state_dict_ema`, a pattern, `*` for each.
        strict: Whether files that cannot be read and weights that are not finite are errors.
        constants: Names of tensors, with `*` and `?`, that the architecture fixes and that need not be finite, such as
            tables. They are stored and never generated. Masks of zeros and minus infinity (or the least float) are
            recognised without.
        distributed: Whether to use Ray Data tasks over all cores and nodes instead of this process.

    Examples:
        >>> raywgen.BuildConfig(sources=["networks"], out="runs/corpus").distributed
        True
    """

    out: str = "runs/corpus"
    sources: list[str] = field(default_factory=list)
    facts: str = ""
    strict_facts: bool = False
    as_text: list[str] = field(default_factory=list)
    select: list[str] = field(default_factory=list)
    strict: bool = False
    constants: list[str] = field(default_factory=list)
    distributed: bool = True


def build_corpus(
    config: BuildConfig,
    on_progress: OnBytes | None = None,
    on_notice: Callable[[str], None] | None = None,
    *,
    session: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Corpus:
    """Ingests all sources and commits them; continues an earlier call with the same sources.

    Args:
        config: The sources and the settings of the ingest.
        on_progress: Called with the bytes read, the bytes of all files, and a line of counts.
        on_notice: Called before the work begins with a line for each row of `config.facts` that could not be used.
        session: Starts Ray, where `config.distributed`; it is entered once the sources are found, as that takes long.

    Raises:
        OutError: Nothing can or should be written to `out`, or its disk has no room for the corpus.
        CorpusError: A source holds nothing, `out` holds a corpus of other sources, a file cannot be written, or,
            where `strict`, a checkpoint is refused.
        InUseError: Another process works on `out`.
    """
    config = replace(config, out=checked_out(config.out, BuildConfig.out))
    if not config.sources:
        raise CorpusError("nothing to ingest; give at least one source")
    found = find_checkpoints(config.sources)
    checkpoints, report = _with_facts(found.checkpoints, config, on_notice)
    if config.select:
        checkpoints = [replace(checkpoint, select=tuple(config.select)) for checkpoint in checkpoints]
    items = plan_items(checkpoints, config.constants)
    storage = CorpusStorage.at(config.out)
    aside = [row.to_row() for row in found.aside]
    content = [[item.name for item in items], aside]
    recipe: JsonObject = {"ingest": hashlib.sha256(json.dumps(content).encode()).hexdigest()}
    if storage.size(MANIFEST) is not None:
        return _existing(config, recipe)
    with writing(config.out):
        if storage.size(MANIFEST) is not None:  # Another process that held the folder a moment ago may have finished.
            return _existing(config, recipe)
        check_corpus_room(items, config.out)
        with session() if config.distributed else nullcontext():
            _ingest_remaining(items, config, storage, on_progress)
        stored = sorted({checkpoint.files[0] for checkpoint in checkpoints if checkpoint.stored_id is not None})
        recipe |= {"sources": config.sources, "facts": config.facts, "others": found.others}
        recipe |= {"facts_report": report.to_json()}
        corpus = _commit(items, config, storage, recipe, [Corpus.open(location) for location in stored], aside)
        storage.delete(JOURNALS)
        remove_unused_shards(corpus)
    return corpus


def _with_facts(
    checkpoints: list[SourceCheckpoint], config: BuildConfig, on_notice: Callable[[str], None] | None
) -> tuple[list[SourceCheckpoint], FactsReport]:
    """Adds the user's facts in their final types, and joins checkpoints of one run, as their names show."""
    checkpoints, report = join_facts(read_facts(config.facts) if config.facts else [], checkpoints)
    if report.problems and config.strict_facts:
        raise CorpusError(
            f"{config.facts}: {len(report.problems)} rows cannot be used as they stand, first {report.problems[0]} "
            "(correct them, or leave `strict_facts` out)"
        )
    if config.facts and on_notice is not None:
        on_notice(f"{config.facts}: {report.num_used} of {report.num_rows} rows are used")
        for problem in report.problems[:_SHOWN_PROBLEMS]:
            on_notice(f"{config.facts}, {problem}")
        if len(report.problems) > _SHOWN_PROBLEMS:
            on_notice(f"... and {len(report.problems) - _SHOWN_PROBLEMS} more rows of that kind")
    typed = one_type_each(((_origin(checkpoint), checkpoint.facts) for checkpoint in checkpoints), config.as_text)
    paired = zip(checkpoints, typed, strict=True)
    return join_runs([replace(one, facts=facts) if facts != one.facts else one for one, facts in paired]), report


def _origin(checkpoint: SourceCheckpoint) -> str:
    return checkpoint.files[0] if checkpoint.stored_id is not None else f"'{checkpoint.name}'"


def _existing(config: BuildConfig, recipe: JsonObject) -> Corpus:
    corpus = Corpus.open(config.out)
    if corpus.manifest["recipe"].get("ingest") != recipe["ingest"]:
        raise CorpusError(
            f"{config.out} already holds a corpus of other sources, or of these before files or facts changed; give "
            "another folder, or join both by `raywgen corpus merge`"
        )
    _refused(corpus.quarantine.to_pylist(), config)
    return corpus


def _ingest_remaining(
    items: list[IngestItem], config: BuildConfig, storage: CorpusStorage, on_progress: OnBytes | None
) -> None:
    kept = set(storage.list(JOURNALS))
    remaining = [item for item in items if journal(item.name).rpartition("/")[2] not in kept]
    # The largest first, so that none of them runs alone at the end.
    remaining.sort(key=lambda item: -item.num_bytes)
    total = sum(item.num_bytes for item in items)
    done = total - sum(item.num_bytes for item in remaining)
    checkpoints = quarantined = 0
    for row in _over_ray(remaining, absolute(config.out)) if config.distributed else _in_process(remaining, config.out):
        done += row["num_bytes"]
        checkpoints += row["checkpoints"]
        quarantined += row["quarantined"]
        if on_progress is not None:
            on_progress(done, total, f"{checkpoints} checkpoints, {quarantined} refused")


def _in_process(items: list[IngestItem], root: str) -> Iterator[dict[str, int]]:
    for item in items:
        yield ingest_item(item, root)


def _over_ray(items: list[IngestItem], root: str) -> Iterator[dict[str, int]]:
    if not items:
        return
    import ray.data

    work = ray.data.from_items([{"item": item} for item in items], override_num_blocks=len(items))
    yield from work.map(partial(_ingest_row, root=root), num_cpus=1).iter_rows()


def _ingest_row(row: dict[str, IngestItem], root: str) -> dict[str, int]:
    return ingest_item(row["item"], root)


def _commit(
    items: list[IngestItem],
    config: BuildConfig,
    storage: CorpusStorage,
    recipe: JsonObject,
    parts: list[Corpus],
    aside: list[dict[str, str]],
) -> Corpus:
    done = [read_journal(storage, item.name) for item in items]
    quarantine = sorted([*aside, *(row for item in done for row in item.quarantine)], key=itemgetter("checkpoint_id"))
    refused = _refused(quarantine, config)
    shards = [shard for item in done for shard in item.shards]
    if not shards:
        first = (refused or quarantine)[0]
        raise CorpusError(f"none of the {len(quarantine)} checkpoints can be used, first: {in_one_line(first)}")
    networks = _networks(done, {key: network for part in parts for key, network in part.networks.items()})
    of_id = {network.layout.id: network.layout for network in networks}
    statistics: Statistics = {}
    for item in done:
        for (form_id, split), sums in item.statistics.items():
            form = item.layouts[form_id]
            add_statistics(statistics, (form.id, split), sums.named_as(form, of_id[form.id]))
    return commit_corpus(
        config.out,
        shards=shards,
        tasks=list({key: task for part in reversed(parts) for key, task in part.tasks.items()}.values()),
        networks=networks,
        recipe=recipe,
        quarantine=quarantine,
        statistics=statistics,
        forms={form_id: form for item in done for form_id, form in item.layouts.items()},
    )


def _refused(quarantine: list[dict[str, str]], config: BuildConfig) -> list[dict[str, str]]:
    refused = list(filter(is_refused, quarantine))
    if config.strict and refused:
        first = refused[0]
        raise CorpusError(
            f"{len(refused)} checkpoints were refused, first {in_one_line(first)}; mend or remove "
            "them, or leave `strict` out to set them aside"
        )
    return refused


def _networks(done: list[IngestResult], known: dict[str, NetworkFacts]) -> list[NetworkFacts]:
    """Returns one network per layout, named by a corpus among the sources, else by facts, folder, file or hash."""
    named: dict[str, str] = {}
    rows: dict[str, list[tuple[str, str]]] = {}
    layouts = _layouts([layout for item in done for layout in item.layouts.values()], known)
    for item in done:
        for shard in item.shards:
            for row in shard.facts:
                rows.setdefault(shard.layout_id, []).append((row["checkpoint_id"], row["source"]))
                if row["architecture"]:
                    named.setdefault(shard.layout_id, row["architecture"])
    named = network_names(rows) | named
    names: dict[str, str] = {}
    taken: set[str] = set()
    for layout_id in sorted(layouts, key=lambda layout_id: (layout_id not in known, layout_id)):
        default = named.get(layout_id, f"layout-{layout_id[:6]}")
        name = known[layout_id].name if layout_id in known else default
        names[layout_id] = f"{name}-{layout_id[:6]}" if name in taken else name
        taken.add(names[layout_id])
    recipes = {layout_id: network.recipe for layout_id, network in known.items()}
    return [
        NetworkFacts(name=names[layout_id], recipe=recipes.get(layout_id, {}), layout=layout)
        for layout_id, layout in layouts.items()
    ]


def _layouts(forms: list[Layout], known: dict[str, NetworkFacts]) -> dict[str, Layout]:
    """Chooses one layout for all forms of an architecture, by id: that of a corpus among the sources, or of a form.

    Libraries that sort tensors by name lose the order of the network, so a form that is not sorted is preferred.
    """
    found: dict[str, list[Layout]] = {}
    for form in forms:
        found.setdefault(form.id, []).append(form)
    chosen = {}
    for layout_id, same in found.items():
        network = known.get(layout_id)
        one = network.layout if network else next((form for form in same if not _is_sorted(form)), same[0]).unwrapped()
        constant = {
            name for form in same for name, spec in zip(form.plain_names, form.tensors, strict=True) if spec.is_constant
        }
        named = zip(one.plain_names, one.tensors, strict=True)
        chosen[layout_id] = one.with_constants({spec.name for name, spec in named if name in constant})
    return chosen


def _is_sorted(form: Layout) -> bool:
    """Whether the tensors of each dtype are sorted by name, as safetensors writes them."""
    names: dict[str, list[str]] = {}
    for _, spec in form.packed_order:
        names.setdefault(spec.dtype, []).append(spec.name)
    return all(of_dtype == sorted(of_dtype) for of_dtype in names.values())
