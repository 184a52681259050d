"""Arrow IPC shards of weights: one layout and one split each, one row a checkpoint.

Shape legend: N checkpoints, P packed bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from raywgen.corpus.errors import RESTORE, CorpusError, DamagedFileError
from raywgen.corpus.facts import CheckpointFacts
from raywgen.corpus.storage import Storage
from raywgen.weights import Layout, NonFiniteWeightsError

_ROWS_PER_BATCH = 512
_SCHEMA = pa.schema([("checkpoint_id", pa.string()), ("packed", pa.binary())])


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A shard as the manifest names it, with the facts of its rows until they are committed."""

    path: str
    layout_id: str
    num_rows: int
    num_bytes: int
    sha256: str
    facts: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """For the manifest; facts go to Parquet."""
        return {
            "path": self.path,
            "layout_id": self.layout_id,
            "num_rows": self.num_rows,
            "num_bytes": self.num_bytes,
            "sha256": self.sha256,
        }


def write_shard(root: str, name: str, layout: Layout, facts: Sequence[CheckpointFacts], packed_NP: Tensor) -> Shard:
    """Writes N checkpoints of one layout; may run anywhere, `commit_corpus` makes the shard part of a corpus.

    Args:
        root: The corpus, a path or URI.
        name: Of the shard, without suffix.
        layout: Of all checkpoints.
        facts: N facts.
        packed_NP: uint8, as `Layout.pack` gives them.

    Raises:
        CorpusError: Facts and weights do not fit each other or the layout, or the file cannot be written.
        NonFiniteWeightsError: A checkpoint holds NaN or infinity; it is named.
    """
    if packed_NP.shape != (len(facts), layout.num_bytes) or packed_NP.dtype != torch.uint8:
        raise CorpusError(
            f"shard {name}: packed weights are {packed_NP.dtype}{list(packed_NP.shape)}, facts and layout ask for "
            f"uint8[{len(facts)}, {layout.num_bytes}]; pack every checkpoint by this layout"
        )
    if len(splits := sorted({row.split for row in facts})) > 1:
        raise CorpusError(f"shard {name}: it mixes the splits {', '.join(splits)}; write one shard for each")
    if wrong := [row.checkpoint_id for row in facts if row.layout_id != layout.id]:
        raise CorpusError(f"shard {name}: checkpoint {wrong[0]} is not of layout {layout.id}; write it apart")
    _check_finite(layout, facts, packed_NP)
    packed_NP = packed_NP.contiguous()
    content = _ipc_bytes([row.checkpoint_id for row in facts], packed_NP.numpy())
    path = f"weights/{name}.arrow"
    sha256 = Storage.at(root).write(path, content)
    rows = [
        {
            **dataclasses.asdict(row),
            "sha256": digest,
            "num_values": layout.num_values,
            "shard": path,
            "row": index,
        }
        for index, (row, digest) in enumerate(zip(facts, row_sums(packed_NP), strict=True))
    ]
    return Shard(
        path=path,
        layout_id=layout.id,
        num_rows=len(facts),
        num_bytes=content.size,
        sha256=sha256,
        facts=rows,
    )


def read_shard(storage: Storage, path: str) -> pa.Table:
    """All rows of a shard, zero-copy where the file is local.

    Raises:
        MissingFileError: It is not there.
        DamagedFileError: It is truncated or no Arrow file.
    """
    with _naming(storage, path):
        table = pa.ipc.open_file(storage.open(path)).read_all()
        return _checked(table)


def read_block(storage: Storage, path: str, layout_id: str, index: int) -> pa.Table:
    """One record batch of a shard, with its layout's id as a third column; raises as `read_shard` does."""
    with _naming(storage, path):
        batch = pa.ipc.open_file(storage.open(path)).get_batch(index)
        table = _checked(pa.Table.from_batches([batch]))
        return table.append_column("layout_id", pa.repeat(pa.scalar(layout_id), table.num_rows))


def num_blocks(storage: Storage, path: str) -> int:
    """Number of a shard's record batches; raises as `read_shard` does."""
    with _naming(storage, path), storage.open(path) as file:
        return pa.ipc.open_file(file).num_record_batches


@contextmanager
def _naming(storage: Storage, path: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DamagedFileError(f"{storage.name}/{path} is truncated or no Arrow file ({error}); {RESTORE}") from error


def _checked(table: pa.Table) -> pa.Table:
    """Refuses what Arrow would read out of bounds later; weights are checked where they become a tensor."""
    if table.schema != _SCHEMA:
        raise pa.ArrowInvalid(f"columns are {table.schema.names}")
    table.column("checkpoint_id").validate(full=True)
    return table


def packed_tensor(block: pa.Table, layout: Layout) -> Tensor:
    """Packed weights uint8 `(N, P)` of a table's rows; a read-only view for a single record batch.

    Raises:
        DamagedFileError: A row has another length than the layout.
    """
    parts = [_packed_chunk(chunk, layout) for chunk in block.column("packed").chunks if len(chunk)]
    if not parts:
        return torch.empty(0, layout.num_bytes, dtype=torch.uint8)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def row_sums(packed_NP: Tensor) -> list[str]:
    """SHA-256 of each row."""
    return [hashlib.sha256(row).hexdigest() for row in packed_NP.numpy()]


def _packed_chunk(chunk: pa.BinaryArray, layout: Layout) -> Tensor:
    num, width = len(chunk), layout.num_bytes
    _, offset_buffer, data = chunk.buffers()
    last = chunk.offset + num
    if offset_buffer is None or offset_buffer.size < 4 * (last + 1):
        raise DamagedFileError(f"the lengths of {num} checkpoints are cut short; {RESTORE}")
    offsets = np.frombuffer(offset_buffer, dtype=np.int32, count=last + 1)[chunk.offset :].astype(np.int64)
    if (np.diff(offsets) != width).any():
        raise DamagedFileError(f"a checkpoint is not {width} bytes long as its layout asks; {RESTORE}")
    start = int(offsets[0])
    if start < 0 or start + num * width > (0 if data is None else data.size):
        raise DamagedFileError(f"checkpoints reach beyond the end of their file; {RESTORE}")
    if num * width == 0:
        return torch.empty(num, width, dtype=torch.uint8)
    # Through DLPack, because torch warns of read-only NumPy arrays: a view of a shard is never written to.
    flat = pa.Array.from_buffers(pa.uint8(), num * width, [None, data], offset=start)
    return torch.from_dlpack(flat).view(num, width)


def _check_finite(layout: Layout, facts: Sequence[CheckpointFacts], packed_NP: Tensor) -> None:
    for name, tensor in layout.unpack(packed_NP).items():
        if not tensor.is_floating_point():
            continue
        bad_N = ~torch.isfinite(tensor).reshape(len(facts), math.prod(tensor.shape[1:])).all(dim=1)
        if bool(bad_N.any()):
            checkpoint = facts[int(bad_N.nonzero()[0])].checkpoint_id
            raise NonFiniteWeightsError(
                f"checkpoint {checkpoint}: tensor '{name}' holds NaN or infinity; drop this checkpoint"
            )


def _ipc_bytes(checkpoint_ids: list[str], packed: np.ndarray) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    # Batches must stay below the 2 GiB that 32-bit offsets of a binary column can address.
    per_batch = max(1, min(_ROWS_PER_BATCH, (1 << 30) // max(1, packed.shape[1])))
    with pa.ipc.new_file(sink, _SCHEMA) as writer:
        for start in range(0, len(packed), per_batch):
            rows = packed[start : start + per_batch]
            offsets = np.arange(len(rows) + 1, dtype=np.int32) * rows.shape[1]
            buffers = [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(rows))]
            column = pa.Array.from_buffers(pa.binary(), len(rows), buffers)
            ids = pa.array(checkpoint_ids[start : start + per_batch], pa.string())
            writer.write_batch(pa.record_batch([ids, column], schema=_SCHEMA))
    return sink.getvalue()
