"""A corpus as a Ray Data stream of whole record batches.

Ray Data has no Arrow IPC reader, and its default batching costs far more than the read. So a block is a record
batch as it lies on disk, memory-mapped where the file is local, and workers slice it themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import ray.data
from pyarrow import fs
from ray.data.block import Block
from ray.data.datasource import FileBasedDatasource

from raywgen.corpus.corpus import Corpus
from raywgen.corpus.errors import RESTORE, CorpusError, DamagedFileError


class ArrowShardDatasource(FileBasedDatasource):
    """Reads Arrow IPC files, one block per record batch, with their layout's id as a column.

    Args:
        paths: Full paths of the shards.
        layout_ids: The layout of each.
        filesystem: Where they lie.
    """

    def __init__(self, paths: Sequence[str], layout_ids: Sequence[str], filesystem: fs.FileSystem) -> None:
        super().__init__(list(paths), filesystem=filesystem, include_paths=False)
        self._layout_of = dict(zip(paths, layout_ids, strict=True))

    def _open_input_source(self, filesystem: fs.FileSystem, path: str, **open_args: object) -> pa.NativeFile:
        local = getattr(filesystem, "unwrap", lambda: filesystem)()
        if isinstance(local, fs.LocalFileSystem):
            return pa.memory_map(path)
        return filesystem.open_input_file(path)

    def _read_stream(self, f: pa.NativeFile, path: str) -> Iterator[Block]:
        try:
            reader = pa.ipc.open_file(f)
            for index in range(reader.num_record_batches):
                batch = reader.get_batch(index)
                layout_id = pa.array([self._layout_of[path]]).dictionary_encode()
                column = pa.DictionaryArray.from_arrays(pa.array([0] * len(batch), pa.int32()), layout_id.dictionary)
                yield pa.Table.from_batches([batch]).append_column("layout_id", column.cast(pa.string()))
        except pa.ArrowException as error:
            raise DamagedFileError(f"{path} is truncated or no Arrow file ({error}); {RESTORE}") from error


def stream(corpus: Corpus, splits: Sequence[str]) -> ray.data.Dataset:
    """Blocks with columns `checkpoint_id`, `layout_id`, `packed`, in the order of shards and rows.

    Shards hold one split each, so those without a wanted row are never read.

    Raises:
        CorpusError: No checkpoint is of these splits.
    """
    wanted = set(pc.unique(corpus.select(split=list(splits)).column("shard")).to_pylist())
    shards = [shard for shard in corpus.shards if shard.path in wanted]
    if not shards:
        raise CorpusError(
            f"{corpus.location} has no checkpoint of the splits {list(splits)}; see `raywgen corpus info`"
        )
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    source = ArrowShardDatasource(
        [corpus.storage.path(shard.path) for shard in shards],
        [shard.layout_id for shard in shards],
        corpus.storage.filesystem,
    )
    return ray.data.read_datasource(source, override_num_blocks=len(shards))
