"""A corpus as a Ray Data stream of whole record batches.

Ray Data has no Arrow IPC reader, and its default batching costs far more than the read. So a block is a record
batch of the file, memory-mapped if the file is local, and workers slice it themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import pyarrow as pa
import ray.data
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from raywgen.corpus.corpus import Corpus
from raywgen.corpus.shards import Shard, num_blocks, read_block
from raywgen.corpus.storage import CorpusStorage

if TYPE_CHECKING:
    from ray.data import DataContext


class ArrowShardDatasource(Datasource):
    """Reads Arrow IPC shards, one task and one block per record batch, with the layout's id as a column.

    Each batch has a task of its own, because Ray Data joins all that one task yields into blocks of its own size.

    Args:
        storage: The corpus' folder.
        shards: The shards to read, in this order.

    Raises:
        DamagedFileError: A shard is truncated.
    """

    def __init__(self, storage: CorpusStorage, shards: Sequence[Shard]) -> None:
        super().__init__()
        self._storage = storage
        self._tasks: list[tuple[Shard, int, int]] = []
        for shard in shards:
            num = num_blocks(storage, shard.path)
            self._tasks += [(shard, index, shard.num_bytes // num) for index in range(num)]

    @property
    def num_blocks(self) -> int:
        """Number of record batches."""
        return len(self._tasks)

    def estimate_inmemory_data_size(self) -> int:
        """Returns the number of bytes of all blocks."""
        return sum(num_bytes for _, _, num_bytes in self._tasks)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        """Returns one task per record batch; `parallelism` is ignored."""
        return [
            ReadTask(
                partial(_read, self._storage, shard.path, shard.layout_id, index),
                BlockMetadata(
                    num_rows=None,
                    size_bytes=num_bytes,
                    exec_stats=None,
                    input_files=(self._storage.path(shard.path),),
                ),
                per_task_row_limit=per_task_row_limit,
            )
            for shard, index, num_bytes in self._tasks
        ]


def dataset(corpus: Corpus, splits: Sequence[str]) -> ray.data.Dataset:
    """Returns blocks with columns `checkpoint_id`, `packed`, `layout_id`, in the order of shards and rows.

    Shards hold one split each, so shards without a selected row are never read.

    Raises:
        CorpusError: No checkpoint belongs to these splits.
    """
    source = ArrowShardDatasource(corpus.storage, corpus.shards_of(splits))
    found = ray.data.read_datasource(source, override_num_blocks=source.num_blocks)
    # Settings of this stream alone: other streams of the process keep theirs.
    found.context.execution_options.preserve_order = True
    found.context.target_max_block_size = None
    return found


def _read(storage: CorpusStorage, path: str, layout_id: str, index: int) -> Iterator[pa.Table]:
    yield read_block(storage, path, layout_id, index)
