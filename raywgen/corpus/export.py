"""Exports checkpoints to files, bit for bit, in their own dtypes and under their own names."""

from __future__ import annotations

import json
import tempfile
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from raywgen.corpus.corpus import Corpus
from raywgen.corpus.errors import CorpusError
from raywgen.corpus.facts import CONFIG_FILES, CONFIG_NAMES, FILE_METADATA
from raywgen.corpus.writing import remove_leftovers, writing
from raywgen.files import write_text
from raywgen.out_folder import local_out
from raywgen.weights import save_state_dict
from raywgen.weights.safetensors_writer import is_writable, read_metadata

_SUFFIX = ".safetensors"
_OURS = "raywgen."
_KEPT_APART = (FILE_METADATA, CONFIG_FILES)
# Most file systems allow 255 bytes, and a file has a longer name while it is being written.
_NAME_BYTES = 240
# The names under which transformers, diffusers and peft find weights beside a config.
_LOADED_AS = {
    "model": "model",
    "pytorch_model": "model",
    "adapter_model": "adapter_model",
    "diffusion_pytorch_model": "diffusion_pytorch_model",
}


@dataclass(frozen=True, slots=True)
class _File:
    """Path and metadata of one file, and the configs beside it."""

    path: Path
    metadata: dict[str, str]
    configs: dict[Path, str]


def export(
    corpus: Corpus,
    out: str | Path,
    terms: Sequence[str] = (),
    on_progress: Callable[[int, int], None] | None = None,
    *,
    overwrite: bool = False,
) -> list[Path]:
    """Writes every checkpoint that satisfies all terms to `OUT/CHECKPOINT_ID.safetensors`.

    The metadata of each file are its original metadata, `format: pt`, and its facts as `raywgen.FACT`. Checkpoints
    of a model folder are written with its configs, and `pytorch_model` becomes `model`, so that `from_pretrained` loads
    the folder. All names, dtypes and existing files are checked before anything is written.

    Args:
        corpus: The corpus to export.
        out: The folder to write to.
        terms: Query that selects checkpoints, as for `Corpus.query`.
        on_progress: Called with the number of files written and their total.
        overwrite: Whether to replace other files. A killed export can continue without it.

    Raises:
        CorpusError: Nothing is selected, an id leads out of the folder or is no file name, two ids become one file, a
            dtype cannot be written, or another file is there.
        OutError: Nothing can or should be written to the folder.
        WeightsError: A file cannot be written.
        InUseError: Another process writes to the folder.
    """
    out = Path(local_out(out, "runs/export", "raywgen corpus export"))
    facts = corpus.query(terms)
    if not facts.num_rows:
        raise CorpusError(f"{corpus.location} holds no checkpoint with {' '.join(terms)}; see `raywgen corpus info`")
    files = {row["checkpoint_id"]: _file(row, out) for row in facts.to_pylist()}
    _check_dtypes(corpus, facts)
    _check_clashes(files, fold_case=False)
    with writing(out):
        _check_clashes(files, fold_case=_folds_case(out))
        if not overwrite:
            _check_existing(files)
        return _write(corpus, files, terms, on_progress)


def _write(
    corpus: Corpus,
    files: Mapping[str, _File],
    terms: Sequence[str],
    on_progress: Callable[[int, int], None] | None,
) -> list[Path]:
    written: list[Path] = []
    for facts, state in corpus.checkpoints(terms):
        file = files[facts["checkpoint_id"]]
        if file.path.parent not in {other.parent for other in written[-1:]}:
            remove_leftovers(file.path.parent)
        tensors = {facts["key_prefix"] + name: tensor for name, tensor in state.items()}
        save_state_dict(tensors, file.path, file.metadata)
        for path, text in file.configs.items():
            write_text(path, text)
        written.append(file.path)
        if on_progress is not None:
            on_progress(len(written), len(files))
    return written


def _file(facts: Mapping[str, Any], out: Path) -> _File:
    checkpoint_id = facts["checkpoint_id"]
    if "\0" in checkpoint_id or not checkpoint_id.strip("/"):
        raise CorpusError(f"checkpoint {checkpoint_id!r} would be written outside of {out}; rename it")
    configs = {name: text for name, text in json.loads(facts.get(CONFIG_FILES) or "{}").items() if name in CONFIG_NAMES}
    stem = PurePosixPath(checkpoint_id).name
    stem = _LOADED_AS.get(stem, stem) if configs else stem
    path = out / PurePosixPath(checkpoint_id).parent / f"{stem}{_SUFFIX}"
    if PurePosixPath(checkpoint_id).is_absolute() or not path.resolve().is_relative_to(out.resolve()):
        raise CorpusError(f"checkpoint '{checkpoint_id}' would be written outside of {out}; rename it")
    if long := [part for part in path.relative_to(out).parts if len(part.encode()) > _NAME_BYTES]:
        raise CorpusError(f"checkpoint '{checkpoint_id}': '{long[0][:40]}...' is too long for a file name; rename it")
    kept = json.loads(facts.get(FILE_METADATA) or "{}")
    known = {name: value for name, value in facts.items() if value is not None and name not in _KEPT_APART}
    metadata = kept | {f"{_OURS}{name}": str(value) for name, value in known.items()}
    beside = {path.parent / name: text for name, text in configs.items()} if stem in _LOADED_AS.values() else {}
    return _File(path, metadata, beside)


def _check_dtypes(corpus: Corpus, facts: pa.Table) -> None:
    unwritable: list[int] = []
    wrong = ""
    for form, of_form, place_N in corpus.by_form(facts):
        if spec := next((spec for spec in form.tensors if not is_writable(spec.torch_dtype)), None):
            unwritable.extend(place_N.tolist())
            first = of_form.column("checkpoint_id")[0]
            wrong = wrong or f"tensor '{spec.name}' of checkpoint '{first}' is {spec.dtype}"
    if unwritable:
        raise CorpusError(f"{wrong}, which safetensors cannot hold; {_without(facts, unwritable)}")


def _without(facts: pa.Table, unwritable: Sequence[int]) -> str:
    """Suggests a query that selects all checkpoints except these rows."""
    if len(unwritable) == facts.num_rows:
        return "no other checkpoint is selected"
    writable = sorted({*range(facts.num_rows)} - {*unwritable})
    # Checkpoints of one shard have one form, so the last of these facts separates them if no other does.
    for name in ("dtype", "layout_id", "shard"):
        values = facts.column(name).to_pylist()
        left_out = {values[row] for row in unwritable}
        if not left_out & {values[row] for row in writable}:
            break
    terms = " ".join(f"'{name}!={value}'" for value in sorted(left_out))
    return f"leave such networks out by the query {terms}"


def _check_clashes(files: Mapping[str, _File], *, fold_case: bool) -> None:
    """Refuses ids that would become one file, or of which one would be a folder of another."""
    first: dict[str, str] = {}
    for checkpoint_id, file in files.items():
        other = first.setdefault(_as_stored(file.path, fold_case), checkpoint_id)
        if other != checkpoint_id:
            raise CorpusError(
                f"checkpoints '{other}' and '{checkpoint_id}' would both be written to {file.path}"
                f"{' (this file system does not distinguish upper from lower case)' if fold_case else ''}; choose one "
                "by a query such as 'checkpoint_id!=...', or rename one"
            )
    configs: dict[str, tuple[str, str]] = {}
    for checkpoint_id, file in files.items():
        for parent in file.path.parents:
            if other := first.get(_as_stored(parent, fold_case)):
                raise CorpusError(f"'{other}' would be written to {parent}, a folder of '{checkpoint_id}'; rename one")
        for path, text in file.configs.items():
            other, known = configs.setdefault(_as_stored(path, fold_case), (checkpoint_id, text))
            if known != text:
                raise CorpusError(f"'{other}' and '{checkpoint_id}' come with different {path}; choose one by a query")


def _as_stored(path: Path, fold_case: bool) -> str:
    # A file system that folds case also identifies é as one or two code points.
    return unicodedata.normalize("NFC", str(path)).casefold() if fold_case else str(path)


def _folds_case(folder: Path) -> bool:
    with tempfile.NamedTemporaryFile(prefix=".raywgen", dir=folder) as probe:
        path = Path(probe.name)
        return path.with_name(path.name.upper()).exists()


def _check_existing(files: Mapping[str, _File]) -> None:
    """Refuses to overwrite files, except those of an earlier export of the same checkpoints."""
    for file in files.values():
        strange = file.path if file.path.exists() and not _is_ours(file) else None
        changed = [path for path, text in file.configs.items() if path.exists() and path.read_text() != text]
        if strange or changed:
            raise CorpusError(
                f"{strange or changed[0]} exists and is something else; give another folder, or replace it by "
                "--overwrite"
            )


def _is_ours(file: _File) -> bool:
    if not file.path.is_file():
        return False
    found = read_metadata(file.path)
    return all(found.get(f"{_OURS}{name}") == file.metadata[f"{_OURS}{name}"] for name in ("checkpoint_id", "sha256"))
