"""Finds the checkpoints in what a user points at: folders, globs, model folders, zoos of runs, hub names."""

from __future__ import annotations

import glob
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from raywgen.corpus.errors import CorpusError
from raywgen.corpus.facts_file import convert
from raywgen.weights.reader import SUFFIXES

_INDEX = ".safetensors.index.json"
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
    """

    name: str
    files: tuple[str, ...]
    num_bytes: int
    facts: dict[str, Any] = field(default_factory=dict)


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
    if path.is_dir():
        yield from _of_folder(path, path)
    elif path.is_file():
        yield _single(path, path.stem)
    elif any(sign in source for sign in "*?["):
        fixed = Path(*_until_magic(path))
        for name in sorted(glob.glob(source, recursive=True)):
            if Path(name).is_file() and Path(name).suffix in SUFFIXES:
                yield _single(Path(name), _name(Path(name), fixed))
    elif _HUB_NAME.match(source):
        folder = _fetch(source)
        for checkpoint in _of_folder(folder, folder):
            yield SourceCheckpoint(
                name=f"{source}/{checkpoint.name}",
                files=checkpoint.files,
                num_bytes=checkpoint.num_bytes,
                facts={"architecture": source} | checkpoint.facts | {"source": f"hub:{source}"},
            )
    else:
        raise CorpusError(f"{source} does not exist; give a folder, file, glob or hub name (owner/name)")


def _until_magic(path: Path) -> Iterator[str]:
    for part in path.parts:
        if any(sign in part for sign in "*?["):
            return
        yield part


def _of_folder(folder: Path, root: Path) -> Iterator[SourceCheckpoint]:
    files = sorted(entry for entry in folder.iterdir() if entry.is_file())
    facts = _folder_facts(folder)
    sharded: set[str] = set()
    for index in (entry for entry in files if entry.name.endswith(_INDEX)):
        parts = _shards_of_index(index)
        sharded |= {part.name for part in parts}
        name = _name(index.with_name(index.name.removesuffix(_INDEX)), root)
        yield SourceCheckpoint(
            name=name, files=tuple(map(str, parts)), num_bytes=sum(part.stat().st_size for part in parts), facts=facts
        )
    metrics = _run_metrics(folder)
    for file in files:
        if file.suffix in SUFFIXES and file.name not in sharded and not file.name.startswith(_NOT_WEIGHTS):
            yield _single(file, _name(file, root), facts)
    for child in sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")):
        step = _RUN_CHECKPOINT.match(child.name)
        inside = child / "checkpoints"
        if step and inside.is_file():
            run = _name(folder, root, keep_suffix=True)
            number = int(step.group(1))
            told = facts | metrics.get(number, {}) | {"trajectory_id": run, "step": number}
            yield _single(inside, f"{run}/step-{number}", told)
        else:
            yield from _of_folder(child, root)


def _single(file: Path, name: str, facts: dict[str, Any] | None = None) -> SourceCheckpoint:
    return SourceCheckpoint(
        name=name, files=(str(file.absolute()),), num_bytes=file.stat().st_size, facts=dict(facts or {})
    )


def _name(path: Path, root: Path, keep_suffix: bool = False) -> str:
    relative = path.relative_to(root) if path != root else Path(path.name)
    return str(relative if keep_suffix or relative.suffix not in SUFFIXES else relative.with_suffix(""))


def _folder_facts(folder: Path) -> dict[str, Any]:
    """Architecture of a model folder or adapter, hyperparameters of a run."""
    facts: dict[str, Any] = {}
    config = _read_json(folder / "config.json")
    names = config.get("architectures")
    if isinstance(names, list) and names:
        facts["architecture"] = str(names[0])
    elif kind := config.get("model_type", config.get("model::type")):
        facts["architecture"] = str(kind)
    adapter = _read_json(folder / "adapter_config.json")
    if base := adapter.get("base_model_name_or_path"):
        facts["architecture"] = f"lora:{base}"
    run = _read_json(folder / "params.json")
    names = {"model::type": "architecture", "optim::optimizer": "optimizer", "optim::lr": "learning_rate"}
    for key, fact in (names | {"seed": "start_seed"}).items():
        with suppress(TypeError, ValueError):  # a run may keep a schedule or a name there: then it says no number
            facts |= {fact: convert(fact, run[key])} if run.get(key) is not None else {}
    return facts


def _run_metrics(folder: Path) -> dict[int, dict[str, Any]]:
    """Facts by step from a run's `result.json`, one JSON object a line."""
    metrics: dict[int, dict[str, Any]] = {}
    path = folder / "result.json"
    if not path.is_file():
        return metrics
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
            step = int(row["training_iteration"])
        except (ValueError, KeyError, TypeError):
            continue
        named = {"test_acc": "test_accuracy", "train_loss": "train_loss"}
        metrics[step] = {fact: float(row[key]) for key, fact in named.items() if isinstance(row.get(key), int | float)}
    return metrics


def _shards_of_index(index: Path) -> list[Path]:
    names = _read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or any(Path(str(name)).name != name for name in names.values()):
        raise CorpusError(f"{index} is no index of a sharded checkpoint; fetch it again")
    parts = [index.parent / str(name) for name in dict.fromkeys(names.values())]
    if missing := [part for part in parts if not part.is_file()]:
        raise CorpusError(f"{missing[0]} is missing, {index} names it; fetch it again")
    return parts


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


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
