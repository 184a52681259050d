"""Finds the checkpoints in what a user points at: folders, globs, model folders, zoos of runs, corpora, hub names."""

from __future__ import annotations

import glob
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from raywgen.corpus.corpus import MANIFEST, Corpus
from raywgen.corpus.errors import CorpusError
from raywgen.corpus.facts import CHECKPOINT_COLUMNS, CHECKPOINT_SCHEMA
from raywgen.corpus.facts_file import convert
from raywgen.corpus.source_tree import MAGIC, SourceTree, until_magic
from raywgen.corpus.storage import Storage, absolute
from raywgen.weights.reader import SUFFIXES

_INDEXES = (".safetensors.index.json", ".bin.index.json")
_ROOT = PurePosixPath()
_HUB_NAME = re.compile(r"^[\w.-]+/[\w.-]+$")
_RUN_CHECKPOINT = re.compile(r"^checkpoint_(\d+)$")
# Beside weights, trainers save these with the same suffixes; they hold no network.
_NOT_WEIGHTS = ("optimizer", "scheduler", "training_args", "rng_state", "scaler")


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceCheckpoint:
    """One checkpoint to read.

    Attributes:
        name: Unique among the sources; its id in the corpus.
        files: Where it lies, more than one for a sharded checkpoint.
        num_bytes: Of all files.
        facts: What folder and neighbouring files say of it.
        stored_id: Under which the corpus `files[0]` holds it; None for files.
    """

    name: str
    files: tuple[str, ...]
    num_bytes: int
    facts: dict[str, Any] = field(default_factory=dict)
    stored_id: str | None = None


def find_checkpoints(sources: list[str]) -> list[SourceCheckpoint]:
    """All checkpoints of all sources, sorted by name.

    Raises:
        CorpusError: A source does not exist or holds none, or two checkpoints have one name.
    """
    found: list[SourceCheckpoint] = []
    for source in sources:
        checkpoints = list(_of_source(source))
        if not checkpoints:
            raise CorpusError(f"{source} holds no checkpoint; give a folder, file or glob of {', '.join(SUFFIXES)}")
        found += checkpoints
    counts = Counter(checkpoint.name for checkpoint in found)
    # net.pt and net.safetensors in one folder: the suffix tells them apart.
    found = [
        replace(checkpoint, name=checkpoint.name + Path(checkpoint.files[0]).suffix)
        if counts[checkpoint.name] > 1
        else checkpoint
        for checkpoint in found
    ]
    found.sort(key=lambda checkpoint: checkpoint.name)
    for one, other in itertools.pairwise(found):
        if one.name == other.name:
            raise CorpusError(
                f"two checkpoints are called '{one.name}' ({one.files[0]} and {other.files[0]}); give one folder that "
                "holds both, so that their paths tell them apart"
            )
    return found


def _of_source(source: str) -> Iterator[SourceCheckpoint]:
    path = Path(source)
    if "://" in source:
        yield from _of_remote(source)
    elif Storage.at(source).size(MANIFEST) is not None:
        yield from _of_corpus(source)
    elif path.is_dir():
        yield from _of_folder(SourceTree(source), _ROOT)
    elif path.is_file():
        yield _single(str(path.absolute()), path.stat().st_size, path.stem)
    elif any(sign in source for sign in MAGIC):
        fixed = Path(until_magic(source)[0] or ("/" if source.startswith("/") else "."))
        for file in (Path(name) for name in sorted(glob.glob(source, recursive=True))):
            if file.is_file() and file.suffix in SUFFIXES:
                yield _single(str(file.absolute()), file.stat().st_size, _name(_relative(file, fixed)))
    elif _HUB_NAME.match(source):
        for checkpoint in _of_folder(SourceTree(str(_fetch(source))), _ROOT):
            facts = {"architecture": source} | checkpoint.facts | {"source": f"hub:{source}"}
            yield replace(checkpoint, name=f"{source}/{checkpoint.name}", facts=facts)
    else:
        raise CorpusError(f"{source} does not exist; give a folder, file, glob or hub name (owner/name)")


def _of_remote(source: str) -> Iterator[SourceCheckpoint]:
    # A query names the endpoint; what stands before it names files.
    location, mark, query = source.partition("?")
    if any(sign in location for sign in MAGIC):
        fixed, pattern = until_magic(location)
        tree = SourceTree(fixed + mark + query)
        for path in tree.matches(pattern):
            if path.suffix in SUFFIXES:
                yield _single(tree.full(path), tree.sizes[path], _name(path))
        return
    storage = Storage.at(source)
    info = storage.filesystem.get_file_info(storage.root)
    if info.is_file:
        yield _single(source, info.size, PurePosixPath(location).stem)
    elif storage.size(MANIFEST) is not None:
        yield from _of_corpus(source)
    else:
        yield from _of_folder(SourceTree(source), _ROOT)


def _of_corpus(location: str) -> Iterator[SourceCheckpoint]:
    corpus = Corpus.open(location)
    ours = {*CHECKPOINT_SCHEMA.names} - {*CHECKPOINT_COLUMNS} | {"checkpoint_id", "layout_id"}
    for row in corpus.facts.to_pylist():
        yield SourceCheckpoint(
            name=row["checkpoint_id"],
            files=(absolute(location),),
            num_bytes=corpus.layout(row["layout_id"]).num_bytes,
            facts={name: value for name, value in row.items() if name not in ours and value is not None},
            stored_id=row["checkpoint_id"],
        )


def _of_folder(tree: SourceTree, folder: PurePosixPath) -> Iterator[SourceCheckpoint]:
    files = tree.files(folder)
    facts = _folder_facts(tree, folder)
    sharded: set[str] = set()
    for index in (file for file in files if file.name.endswith(_INDEXES)):
        parts = _shards_of_index(tree, index)
        sharded |= {part.name for part in parts}
        yield SourceCheckpoint(
            name=_name(index.with_name(index.name.removesuffix(".index.json"))),
            files=tuple(map(tree.full, parts)),
            num_bytes=sum(tree.sizes[part] for part in parts),
            facts=facts,
        )
    for file in files:
        if file.suffix in SUFFIXES and file.name not in sharded and not file.name.startswith(_NOT_WEIGHTS):
            yield _single(tree.full(file), tree.sizes[file], _name(file), facts)
    metrics = _run_metrics(tree, folder)
    for child in tree.folders(folder):
        step = _RUN_CHECKPOINT.match(child.name)
        inside = child / "checkpoints"
        if step and inside in tree.sizes:
            run = folder if folder.name else PurePosixPath(PurePosixPath(tree.full(folder)).name)
            number = int(step.group(1))
            told = facts | metrics.get(number, {}) | {"trajectory_id": str(run), "step": number}
            yield _single(tree.full(inside), tree.sizes[inside], f"{run}/step-{number}", told)
        else:
            yield from _of_folder(tree, child)


def _single(file: str, num_bytes: int, name: str, facts: dict[str, Any] | None = None) -> SourceCheckpoint:
    return SourceCheckpoint(name=name, files=(file,), num_bytes=num_bytes, facts=dict(facts or {}))


def _relative(file: Path, folder: Path) -> PurePosixPath:
    return PurePosixPath(file.relative_to(folder).as_posix())


def _name(path: PurePosixPath) -> str:
    return str(path.with_suffix("") if path.suffix in SUFFIXES else path)


def _folder_facts(tree: SourceTree, folder: PurePosixPath) -> dict[str, Any]:
    """Architecture of a model folder or adapter, hyperparameters of a run."""
    facts: dict[str, Any] = {}
    config = tree.read_json(folder / "config.json")
    names = config.get("architectures")
    if isinstance(names, list) and names:
        facts["architecture"] = str(names[0])
    elif kind := config.get("model_type", config.get("model::type")):
        facts["architecture"] = str(kind)
    adapter = tree.read_json(folder / "adapter_config.json")
    if base := adapter.get("base_model_name_or_path"):
        facts["architecture"] = f"lora:{base}"
    run = tree.read_json(folder / "params.json")
    names = {"model::type": "architecture", "optim::optimizer": "optimizer", "optim::lr": "learning_rate"}
    for key, fact in (names | {"seed": "start_seed"}).items():
        with suppress(TypeError, ValueError):  # a run may keep a schedule or a name there: then it says no number
            facts |= {fact: convert(fact, run[key])} if run.get(key) is not None else {}
    return facts


def _run_metrics(tree: SourceTree, folder: PurePosixPath) -> dict[int, dict[str, Any]]:
    """Facts by step from a run's `result.json`, one JSON object a line."""
    metrics: dict[int, dict[str, Any]] = {}
    for line in tree.read_text(folder / "result.json").splitlines():
        try:
            row = json.loads(line)
            step = int(row["training_iteration"])
        except (ValueError, KeyError, TypeError):
            continue
        named = {"test_acc": "test_accuracy", "train_loss": "train_loss"}
        metrics[step] = {fact: float(row[key]) for key, fact in named.items() if isinstance(row.get(key), int | float)}
    return metrics


def _shards_of_index(tree: SourceTree, index: PurePosixPath) -> list[PurePosixPath]:
    names = tree.read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or any(Path(str(name)).name != name for name in names.values()):
        raise CorpusError(f"{tree.full(index)} is no index of a sharded checkpoint; fetch it again")
    parts = [index.parent / str(name) for name in dict.fromkeys(names.values())]
    if missing := [part for part in parts if part not in tree.sizes]:
        raise CorpusError(f"{tree.full(missing[0])} is missing, {tree.full(index)} names it; fetch it again")
    return parts


def _fetch(name: str) -> Path:
    try:
        import huggingface_hub  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise CorpusError(f"{name} is no file or folder; for hub names run `pip install huggingface_hub`") from error
    try:
        return Path(
            huggingface_hub.snapshot_download(name, allow_patterns=[f"*{suffix}" for suffix in SUFFIXES] + ["*.json"])
        )
    except Exception as error:  # the hub's client raises many kinds
        raise CorpusError(f"{name} is no file or folder, and the hub does not give it: {error}") from error
