"""A compressed corpus: a folder that holds the codes of all networks, and the facts as they were.

    compressed.json       what `manifest.json` says of networks and layouts, the codec's settings, all checksums
    checkpoints.parquet   facts, tasks and quarantine, copied from the corpus
    codes/*.parquet       rows of `checkpoint_id`, `code` (bytes) and `kept` (tensors that no generator writes)

A compressed corpus is not a corpus itself; `decompress` makes one of it. The manifest is written last and in one step.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from raywgen.config import ConfigError
from raywgen.corpus.commit import commit_corpus
from raywgen.corpus.compression.bitstream import BitstreamError, from_bytes, to_bytes
from raywgen.corpus.compression.codec import BudgetError, NetworkCodec
from raywgen.corpus.compression.config import CodecConfig
from raywgen.corpus.corpus import Corpus
from raywgen.corpus.derive import groups_of_shards, new_facts, new_root
from raywgen.corpus.errors import RESTORE, CorpusError, DamagedFileError, MissingFileError
from raywgen.corpus.facts import tasks_from_table
from raywgen.corpus.manifest import CHECKPOINTS, QUARANTINE, TASKS, Contents
from raywgen.corpus.shards import Shard, write_shard
from raywgen.corpus.statistics import LayoutStatistics, Statistics, add_statistics
from raywgen.corpus.storage import CorpusStorage
from raywgen.corpus.writing import remove_unused_shards, writing
from raywgen.inputs import UnusableFileError
from raywgen.parquet import bounded_table
from raywgen.sealed import SealError, sealed_json, unseal
from raywgen.stored_config import stored_config
from raywgen.weights import Layout, StateDict

COMPRESSED = "compressed.json"
FORMAT_VERSION = 1
_CODE_SCHEMA = pa.schema(
    [("checkpoint_id", pa.string()), ("code", pa.large_binary()), ("kept", pa.large_binary())]
)  # fmt: skip
Progress = Callable[[int, int], None]
"""A function that is called with the number of checkpoints that are done, and of all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compressed:
    """The sizes before and after a compression.

    Attributes:
        num_checkpoints: Number of networks.
        num_bytes: Bytes of their weights as the corpus holds them.
        code_bytes: Bytes of their codes.
        bits_per_value: Bits of the codes over all values.
    """

    num_checkpoints: int
    num_bytes: int
    code_bytes: int
    bits_per_value: float


def compress(root: str, corpus: Corpus, config: CodecConfig, on_progress: Progress | None = None) -> Compressed:
    """Writes a compressed corpus into a new folder; the corpus stays as it is.

    Args:
        root: The folder, a path or URI.
        corpus: The corpus to compress.
        config: The codec's settings.
        on_progress: Called after each checkpoint.

    Raises:
        BudgetError: A network's scales and small tensors alone exceed the budget; the network is named.
        CorpusError: `root` holds a corpus or a compressed one.
        InUseError: Another process works on `root`.
    """
    root = new_root(root)
    storage = CorpusStorage.at(root)
    if storage.size(COMPRESSED) is not None:
        raise CorpusError(f"{root} already holds a compressed corpus; give another folder")
    codec = NetworkCodec(config)
    num_bytes = code_bytes = num_values = done = 0
    codes: list[dict[str, str]] = []
    with writing(root):
        for group in groups_of_shards(corpus, corpus.facts):
            form, packed_NP = corpus.form(group.column("shard")[0].as_py()), corpus.packed(group)
            rows = []
            for name, packed_P in zip(group.column("checkpoint_id").to_pylist(), packed_NP, strict=True):
                rows.append({"checkpoint_id": name, **_coded(name, form, packed_P, codec)})
                done += 1
                if on_progress is not None:
                    on_progress(done, corpus.facts.num_rows)
            path = f"codes/{len(codes):06d}.parquet"
            digest = storage.write(path, _parquet(pa.Table.from_pylist(rows, _CODE_SCHEMA)))
            codes.append({"path": path, "form_id": form.form_id, "sha256": digest})
            num_bytes += packed_NP.numel()
            num_values += form.num_values * len(rows)
            code_bytes += sum(len(row["code"]) + len(row["kept"]) for row in rows)
        _write_manifest(storage, corpus, config, codes)
    return Compressed(
        num_checkpoints=done,
        num_bytes=num_bytes,
        code_bytes=code_bytes,
        bits_per_value=8 * code_bytes / max(1, num_values),
    )


def decompress(root: str, location: str, on_progress: Progress | None = None) -> Corpus:
    """Writes the corpus that a compressed one stands for into a new folder.

    Args:
        root: The new corpus, a path or URI.
        location: The compressed corpus.
        on_progress: Called after each checkpoint.

    Raises:
        CorpusError: `root` holds a corpus, or a file cannot be written.
        DamagedFileError: A file of the compressed corpus was changed or cannot be read.
        MissingFileError: `location` is no compressed corpus, or a file of it is missing.
        InUseError: Another process works on `root`.
    """
    root = new_root(root)
    source = CorpusStorage.at(location)
    manifest = _read_manifest(source)
    contents = Contents.read(manifest, source)
    codec = NetworkCodec(_codec_config(manifest, source))
    tables = {name: _table(source, path, manifest["sha256"][path]) for name, path in manifest["files"].items()}
    place_of = {name: index for index, name in enumerate(tables[CHECKPOINTS].column("checkpoint_id").to_pylist())}
    shards: list[Shard] = []
    statistics: Statistics = {}
    done = 0
    with writing(root):
        for index, file in enumerate(manifest["codes"]):
            form = contents.forms[file["form_id"]]
            table = _table(source, file["path"], file["sha256"])
            rows = []
            for row in table.to_pylist():
                rows.append(_decoded(row, form, codec, f"{source.name}/{file['path']}"))
                done += 1
                if on_progress is not None:
                    on_progress(done, len(place_of))
            packed_NP = torch.stack(rows)
            facts = tables[CHECKPOINTS].take([place_of[name] for name in table.column("checkpoint_id").to_pylist()])
            shards.append(write_shard(root, f"{index:06d}", form, new_facts(facts), packed_NP))
            sums = LayoutStatistics.measure(form, packed_NP).named_as(form, contents.networks[form.id].layout)
            add_statistics(statistics, (form.id, facts.column("split")[0].as_py()), sums)
        corpus = commit_corpus(
            root,
            shards=shards,
            tasks=list(tasks_from_table(tables[TASKS]).values()),
            networks=list(contents.networks.values()),
            recipe=manifest["recipe"] | {"codec": manifest["codec"]},
            quarantine=tables[QUARANTINE].to_pylist() if QUARANTINE in tables else [],
            statistics=statistics,
            forms={key: form for key, form in contents.forms.items() if key in {shard.form_id for shard in shards}},
        )
        remove_unused_shards(corpus)
    return corpus


def _coded(name: str, form: Layout, packed_P: Tensor, codec: NetworkCodec) -> dict[str, bytes]:
    state = form.unpack(packed_P)
    try:
        code = to_bytes(codec.encode(state, form), codec)
    except BudgetError as error:
        raise BudgetError(f"{name}: {error}") from error
    return {"code": code, "kept": b"".join(_bytes(state[key]) for key in _kept_names(form))}


def _decoded(row: dict[str, Any], form: Layout, codec: NetworkCodec, file: str) -> Tensor:
    kept: StateDict = {}
    start = 0
    for spec in form.tensors:
        if spec.name in _kept_names(form):
            raw = bytearray(row["kept"][start : start + spec.num_bytes])
            start += spec.num_bytes
            if len(raw) != spec.num_bytes:
                raise DamagedFileError(f"{file}: {row['checkpoint_id']} lacks values of {spec.name}; {RESTORE}")
            empty = torch.empty(spec.shape, dtype=spec.torch_dtype)
            kept[spec.name] = torch.frombuffer(raw, dtype=spec.torch_dtype).view(spec.shape) if raw else empty
    try:
        coded = from_bytes(row["code"], form, codec)
    except BitstreamError as error:
        raise DamagedFileError(f"{file}: the code of {row['checkpoint_id']} is damaged: {error}; {RESTORE}") from error
    return form.pack(codec.decode(coded, kept))


def _kept_names(form: Layout) -> list[str]:
    return [spec.name for spec in form.tensors if not spec.is_generated and not spec.tied_to]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _write_manifest(storage: CorpusStorage, corpus: Corpus, config: CodecConfig, codes: list[dict[str, str]]) -> None:
    files = {kind: corpus.storage.read(name) for kind, name in corpus.manifest["files"].items()}
    contents = {kind: content for kind, content in files.items() if kind in (CHECKPOINTS, TASKS, QUARANTINE)}
    manifest = {
        **{key: corpus.manifest[key] for key in ("schema_version", "recipe", "networks")},
        "forms": {key: form.to_json() for key, form in corpus.forms.items()},
        "shards": [],
        "files": {kind: kind for kind in contents},
        "sha256": {kind: hashlib.sha256(content).hexdigest() for kind, content in contents.items()},
        "format_version": FORMAT_VERSION,
        "codec": asdict(config),
        "codes": codes,
    }
    storage.write_all({**contents, COMPRESSED: sealed_json(manifest, indent=1).encode()})


def _read_manifest(storage: CorpusStorage) -> dict[str, Any]:
    if storage.size(COMPRESSED) is None:
        raise MissingFileError(
            f"{storage.name} holds no {COMPRESSED}: it is no compressed corpus; make one by `raywgen corpus compress`"
        )
    try:
        manifest = unseal(storage.read(COMPRESSED))
    except SealError as error:
        raise DamagedFileError(f"{storage.name}/{COMPRESSED} is damaged: {error}; {RESTORE}") from error
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CorpusError(
            f"{storage.name} has format {manifest.get('format_version')}, this version reads {FORMAT_VERSION}; "
            "use the version of raywgen that wrote it"
        )
    return manifest


def _codec_config(manifest: dict[str, Any], storage: CorpusStorage) -> CodecConfig:
    try:
        return stored_config(CodecConfig, manifest["codec"], f"{storage.name}/{COMPRESSED}: codec")
    except ConfigError as error:
        raise DamagedFileError(f"{error}; {RESTORE}") from error


def _table(storage: CorpusStorage, path: str, digest: str) -> pa.Table:
    content = storage.read(path)
    if hashlib.sha256(content).hexdigest() != digest:
        raise DamagedFileError(f"{storage.name}/{path} has another checksum than {COMPRESSED} says; {RESTORE}")
    try:
        return bounded_table(pa.BufferReader(content), path)
    except (UnusableFileError, pa.ArrowException, OSError) as error:
        raise DamagedFileError(f"{storage.name}/{path} cannot be read ({error}); {RESTORE}") from error


def _parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    # Statistics would hold the least and the greatest code once more.
    pq.write_table(table, buffer, compression="none", use_dictionary=False, write_statistics=False)
    return buffer.getvalue()
