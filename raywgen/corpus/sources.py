"""Finds checkpoints in the sources that a user gives: folders, globs, model folders, runs, corpora, hub names."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from raywgen.corpus.aside import PASSED_OVER, REFUSED, SetAside
from raywgen.corpus.corpus import Corpus
from raywgen.corpus.errors import CorpusError
from raywgen.corpus.fact_types import convert
from raywgen.corpus.facts import CHECKPOINT_COLUMNS, CHECKPOINT_SCHEMA, CONFIG_FILES, CONFIG_NAMES, FactValue
from raywgen.corpus.manifest import MANIFEST
from raywgen.corpus.sharded import is_index, may_be_part, name_of_index, parts_of_index, stray_part
from raywgen.corpus.source_tree import MAGIC, SourceTree, until_magic
from raywgen.corpus.storage import CorpusStorage
from raywgen.extras import hub_needed
from raywgen.locations import absolute, as_uri
from raywgen.weights.kinds import (
    LEGACY,
    SUFFIXES,
    ZIP,
    foreign,
    foreign_archive,
    is_pickle,
    is_safetensors,
    weights_suffix,
)

_ROOT = PurePosixPath()
# The config of a folder that transformers, diffusers or peft load has one of these keys.
_MODEL_CONFIG = {"architectures", "model_type", "_class_name", "peft_type"}
_HUB_NAME = re.compile(r"^[\w.-]+/[\w.-]+$")
_RUN_CHECKPOINT = re.compile(r"^checkpoint_(\d+)$")
# Files with these suffixes are only counted; all others without a weights' suffix are examined.
_NO_WEIGHTS = (
    *(".json", ".jsonl", ".txt", ".md", ".csv", ".tsv", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".log", ".py"),
    *(".ipynb", ".html", ".sh", ".xml", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".pdf", ".parquet", ".arrow"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceCheckpoint:
    """One checkpoint to read.

    Attributes:
        name: Its id in the corpus, unique among the sources.
        files: Its files, more than one for a sharded checkpoint.
        num_bytes: Number of bytes of all files.
        facts: Facts from its folder and neighbouring files.
        stored_id: Its id in the corpus `files[0]`; None if it is read from files.
        index: The index that maps tensors to files; None for a checkpoint of one file.
        changed: Time of the last change of its files; it differs if their bytes do.
        full_name: The name with the suffix, for which `name` is short.
        real: Identity of the bytes on the disk, whatever the path to them.
        select: Keys of the networks to take from files that hold several.
        detour: Rank of its path; of several paths to the same bytes the lowest one is taken.
    """

    name: str
    files: tuple[str, ...]
    num_bytes: int
    facts: dict[str, FactValue] = field(default_factory=dict)
    stored_id: str | None = None
    index: str | None = None
    changed: str = ""
    full_name: str = ""
    real: tuple[str, ...] = ()
    select: tuple[str, ...] = ()
    detour: int = 0


@dataclass(frozen=True, slots=True)
class FoundCheckpoints:
    """The content of sources.

    Attributes:
        checkpoints: Checkpoints, sorted by name.
        aside: Entries that are not taken.
        others: Number of files without weights, by suffix.
    """

    checkpoints: list[SourceCheckpoint]
    aside: list[SetAside]
    others: dict[str, int]


@dataclass(frozen=True, slots=True)
class _Other:
    suffix: str


_Entry = SourceCheckpoint | SetAside | _Other


def find_checkpoints(sources: list[str]) -> FoundCheckpoints:
    """Finds all checkpoints of all sources; the same file counts once.

    Raises:
        CorpusError: A source does not exist or holds no checkpoint, or two checkpoints have one name.
    """
    found: list[SourceCheckpoint] = []
    aside: list[SetAside] = []
    others: Counter[str] = Counter()
    for source in dict.fromkeys(sources):
        entries = list(_of_source(source))
        checkpoints = [entry for entry in entries if isinstance(entry, SourceCheckpoint)]
        rows = [entry for entry in entries if isinstance(entry, SetAside)]
        counts = Counter(entry.suffix for entry in entries if isinstance(entry, _Other))
        if not checkpoints and not any(row.kind == REFUSED for row in rows):
            raise CorpusError(f"{source} holds no checkpoint; {_what_it_holds(rows, counts)}")
        found += checkpoints
        aside += rows
        others += counts
    found, doubles = _once(found)
    return FoundCheckpoints(_named_apart(found), aside + doubles, dict(sorted(others.items())))


def _what_it_holds(rows: list[SetAside], counts: Counter[str]) -> str:
    seen = [f"{number} files {suffix or 'without suffix'}" for suffix, number in counts.most_common(5)]
    seen = [f"{row.checkpoint_id} {row.reason.partition(';')[0]}" for row in rows[:3]] + seen
    return f"{'it has ' + ', '.join(seen) + '; ' if seen else ''}give a folder, file or glob of {', '.join(SUFFIXES)}"


def _once(found: list[SourceCheckpoint]) -> tuple[list[SourceCheckpoint], list[SetAside]]:
    """Drops further paths to the same bytes; a real path with a weights' suffix is preferred to a link."""
    kept: dict[tuple[str, ...], SourceCheckpoint] = {}
    for checkpoint in sorted(found, key=lambda checkpoint: checkpoint.detour):
        kept.setdefault(checkpoint.real, checkpoint)
    doubles = [
        SetAside(
            checkpoint_id=checkpoint.name,
            file=checkpoint.files[0],
            reason=f"is the same file as '{kept[checkpoint.real].name}'",
            kind=PASSED_OVER,
        )
        for checkpoint in found
        if checkpoint is not kept[checkpoint.real]
    ]
    return list(kept.values()), doubles


def _named_apart(found: list[SourceCheckpoint]) -> list[SourceCheckpoint]:
    """Sorts by name, and adds suffixes if names clash, as those of net.pt and net.safetensors in one folder do."""
    while doubled := {name for name, count in Counter(c.name for c in found).items() if count > 1}:
        longer = [replace(c, name=c.full_name) if c.name in doubled and c.full_name else c for c in found]
        if longer == found:
            break
        found = longer
    found = sorted(found, key=lambda checkpoint: checkpoint.name)
    for one, other in itertools.pairwise(found):
        if one.name == other.name:
            raise CorpusError(
                f"two checkpoints are called '{one.name}' ({one.files[0]} and {other.files[0]}); give one folder that "
                "holds both, so that their paths distinguish them"
            )
    return found


def _of_source(source: str) -> Iterator[_Entry]:
    path = Path(source)
    is_remote = "://" in source
    # The query of a URI names the endpoint; the part before it names files.
    location, mark, query = source.partition("?") if is_remote else (source, "", "")
    if not path.exists() and any(sign in location for sign in MAGIC):
        fixed, pattern = until_magic(location)
        tree = SourceTree((fixed or ("/" if source.startswith("/") else ".")) + mark + query, pattern)
        yield from _of_tree(tree, set(tree.matches()))
    elif path.is_file():
        yield from _of_file(str(path.absolute().parent), path.name)
    elif is_remote or path.is_dir():
        storage = CorpusStorage.at(source)
        if storage.size(MANIFEST) is not None:
            yield from _of_corpus(source)
        elif is_remote and storage.filesystem.get_file_info(storage.root).is_file:
            folder, _, name = as_uri(location).rpartition("/")
            yield from _of_file(folder + mark + query, unquote(name))
        else:
            yield from _of_tree(SourceTree(source), None)
    elif _HUB_NAME.match(source):
        for entry in _of_tree(SourceTree(str(_fetch(source))), None):
            if isinstance(entry, SourceCheckpoint):
                facts = {"architecture": source} | entry.facts | {"source": f"hub:{source}"}
                names = {"name": f"{source}/{entry.name}", "full_name": f"{source}/{entry.full_name}"}
                yield replace(entry, facts=facts, **names)
            else:
                yield entry
    else:
        raise CorpusError(f"{source} does not exist; give a folder, file, glob or hub name (owner/name)")


def _of_file(folder: str, name: str) -> Iterator[_Entry]:
    """Yields the checkpoint of a file that the user named, unless it is a part of a network."""
    file = PurePosixPath(name)
    tree = SourceTree(folder, "*") if is_index(name) or may_be_part(file) else SourceTree(folder, only=name)
    if is_index(name):
        yield _of_index(tree, file, {})[0]
    elif reason := stray_part(tree, file):
        yield _aside(tree, file, reason, REFUSED)
    else:
        # Without a weights' suffix, only the last suffix is cut off.
        stem = _name(file) if weights_suffix(name) else file.stem
        yield replace(_single(tree, file, {}, weights_suffix(name)), name=stem)


def _of_corpus(location: str) -> Iterator[SourceCheckpoint]:
    corpus = Corpus.open(location)
    ours = {*CHECKPOINT_SCHEMA.names} - {*CHECKPOINT_COLUMNS} | {"checkpoint_id", "layout_id"}
    for row in corpus.facts.to_pylist():
        yield SourceCheckpoint(
            name=row["checkpoint_id"],
            files=(absolute(location),),
            num_bytes=corpus.form(row["shard"]).num_bytes,
            facts={name: value for name, value in row.items() if name not in ours and value is not None},
            stored_id=row["checkpoint_id"],
            changed=row["sha256"],
            real=(absolute(location), row["checkpoint_id"]),
        )


def _of_tree(tree: SourceTree, wanted: set[PurePosixPath] | None) -> Iterator[_Entry]:
    """Yields all entries of a tree, or those that match a pattern."""
    for path, reason, kind in tree.aside:
        if wanted is None or tree.names(path):
            yield _aside(tree, path, reason, kind)
    yield from _of_folder(tree, _ROOT, wanted)


def _of_folder(tree: SourceTree, folder: PurePosixPath, wanted: set[PurePosixPath] | None) -> Iterator[_Entry]:
    files = tree.files(folder)
    chosen = files if wanted is None else [file for file in files if file in wanted]
    facts = _folder_facts(tree, folder) if chosen else {}
    sharded: set[PurePosixPath] = set()
    for index in (file for file in files if is_index(file.name)):
        entry, parts = _of_index(tree, index, facts)
        if wanted is None or index in wanted or parts & wanted:
            sharded |= parts
            yield entry
    yield from _of_files(tree, [file for file in chosen if file not in sharded and not is_index(file.name)], facts)
    metrics = _run_metrics(tree, folder)
    for child in tree.folders(folder):
        step = _RUN_CHECKPOINT.match(child.name)
        inside = child / "checkpoints"
        if step and inside in tree.sizes and (wanted is None or inside in wanted):
            run = folder if folder.name else PurePosixPath(PurePosixPath(tree.full(folder)).name)
            number = int(step.group(1))
            step_facts = facts | metrics.get(number, {}) | {"trajectory_id": str(run), "step": number}
            yield replace(_single(tree, inside, step_facts, weights_suffix(inside.name)), name=f"{run}/step-{number}")
        else:
            yield from _of_folder(tree, child, wanted)


def _of_index(
    tree: SourceTree, index: PurePosixPath, facts: dict[str, FactValue]
) -> tuple[SourceCheckpoint | SetAside, set[PurePosixPath]]:
    """Returns a sharded checkpoint and its files; if the index is bad, the files that seem to be its parts."""
    name = str(name_of_index(index))
    try:
        parts = parts_of_index(tree, index)
    except CorpusError as error:
        row = SetAside(checkpoint_id=name, file=tree.full(index), reason=str(error))
        stem = index.name.partition(".")[0]
        return row, {file for file in tree.files(index.parent) if file.name.startswith(stem) and may_be_part(file)}
    listed = [tree.listed[part] for part in parts]
    checkpoint = SourceCheckpoint(
        name=name,
        files=tuple(map(tree.full, parts)),
        num_bytes=sum(file.size for file in listed),
        facts=facts,
        index=tree.full(index),
        changed=" ".join(file.changed for file in [tree.listed[index], *listed]),
        full_name=str(index),
        real=tuple(file.real for file in [*listed, tree.listed[index]]),
        detour=int(tree.listed[index].is_link),
    )
    return checkpoint, set(parts)


def _of_files(tree: SourceTree, files: list[PurePosixPath], facts: dict[str, FactValue]) -> Iterator[_Entry]:
    unknown = [file for file in files if not weights_suffix(file.name) and file.suffix.lower() not in _NO_WEIGHTS]
    heads = dict(zip(unknown, tree.heads(unknown), strict=True))
    for file in files:
        if reason := stray_part(tree, file):
            yield _aside(tree, file, reason, REFUSED)
        elif heads and file in heads:
            yield _by_content(tree, file, heads[file], facts)
        elif suffix := weights_suffix(file.name):
            yield _single(tree, file, facts, suffix)
        else:
            yield _Other(file.suffix)


def _by_content(tree: SourceTree, file: PurePosixPath, head: bytes | OSError, facts: dict[str, FactValue]) -> _Entry:
    """Classifies a file without a weights' suffix by its content."""
    if isinstance(head, OSError):
        return _aside(tree, file, f"cannot be read ({head.strerror or head}); check its permissions", REFUSED)
    kind = foreign(head, file.name)
    if kind is None and head.startswith(ZIP):
        with tree.open(file) as opened:
            kind = foreign_archive(opened)
    if kind is not None:
        return _aside(tree, file, kind.what, REFUSED if kind.is_broken else PASSED_OVER)
    if head.startswith((ZIP, LEGACY)) or is_safetensors(head, tree.sizes[file]):
        return _single(tree, file, facts, "")
    if is_pickle(head):
        return _aside(tree, file, "is a pickle that torch did not write; save a state_dict by torch.save", PASSED_OVER)
    return _Other(file.suffix)


def _single(tree: SourceTree, file: PurePosixPath, facts: dict[str, FactValue], suffix: str) -> SourceCheckpoint:
    """Returns the checkpoint of one file, whose name ends in this suffix (empty for none)."""
    listed = tree.listed[file]
    name = str(file)
    return SourceCheckpoint(
        name=name[: len(name) - len(suffix)],
        files=(tree.full(file),),
        num_bytes=listed.size,
        facts=dict(facts),
        changed=listed.changed,
        full_name=name,
        real=(listed.real,),
        detour=int(listed.is_link) if suffix else 2,
    )


def _aside(tree: SourceTree, path: PurePosixPath, reason: str, kind: str) -> SetAside:
    return SetAside(checkpoint_id=_name(path), file=tree.full(path), reason=reason, kind=kind)


def _name(path: PurePosixPath) -> str:
    suffix = weights_suffix(path.name)
    return str(path)[: -len(suffix)] if suffix else str(path)


def _folder_facts(tree: SourceTree, folder: PurePosixPath) -> dict[str, FactValue]:
    """Reads the architecture of a model folder or adapter, and the hyperparameters of a run."""
    facts: dict[str, FactValue] = {}
    config = tree.read_json(folder / "config.json")
    names = config.get("architectures")
    if isinstance(names, list) and names:
        facts["architecture"] = str(names[0])
    elif kind := config.get("model_type", config.get("model::type")):
        facts["architecture"] = str(kind)
    adapter = tree.read_json(folder / "adapter_config.json")
    if base := adapter.get("base_model_name_or_path"):
        facts["architecture"] = f"{str(adapter.get('peft_type') or 'lora').lower()}:{base}"
    texts = {name: tree.read_text(folder / name) for name in CONFIG_NAMES}
    if _MODEL_CONFIG & {*config, *adapter}:
        facts[CONFIG_FILES] = json.dumps({name: text for name, text in texts.items() if text}, sort_keys=True)
    run = tree.read_json(folder / "params.json")
    names = {"model::type": "architecture", "optim::optimizer": "optimizer", "optim::lr": "learning_rate"}
    for key, fact in (names | {"seed": "start_seed"}).items():
        with suppress(TypeError, ValueError):  # a run may have a schedule or a name there instead of a number
            facts |= {fact: convert(fact, run[key])} if run.get(key) is not None else {}
    return facts


def _run_metrics(tree: SourceTree, folder: PurePosixPath) -> dict[int, dict[str, FactValue]]:
    """Reads facts by step from a run's `result.json`, which has one JSON object a line."""
    metrics: dict[int, dict[str, FactValue]] = {}
    for line in tree.read_text(folder / "result.json").splitlines():
        try:
            row = json.loads(line)
            step = int(row["training_iteration"])
        except (ValueError, KeyError, TypeError):
            continue
        named = {"test_acc": "test_accuracy", "train_loss": "train_loss"}
        metrics[step] = {fact: float(row[key]) for key, fact in named.items() if isinstance(row.get(key), int | float)}
    return metrics


def _fetch(name: str) -> Path:
    try:
        import huggingface_hub  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise CorpusError(
            f"{name} is no file or folder, and {hub_needed('a name of the hub', 'huggingface_hub')}"
        ) from error
    try:
        return Path(
            huggingface_hub.snapshot_download(name, allow_patterns=[f"*{suffix}" for suffix in SUFFIXES] + ["*.json"])
        )
    except Exception as error:  # the hub's client raises many kinds
        raise CorpusError(f"{name} is no file or folder, and the hub does not give it: {error}") from error
