"""Reads Parquet files from unknown sources, and refuses those that would expand far beyond their length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from raywgen.inputs import check_expansion

_BATCH_BYTES = 64 << 20
_LEAST_ROWS = 16
_MOST_ROWS = 1 << 16
_BYTES_OF_A_ROW = 8


def open_parquet(source: pa.NativeFile, what: str) -> pq.ParquetFile:
    """Opens a file, and refuses it if its footer claims far more data than the file is long.

    Args:
        source: An open file.
        what: Name of the file for messages.

    Raises:
        UnusableFileError: The footer claims far more.
        pyarrow.ArrowException: The file is no Parquet file.
    """
    file = pq.ParquetFile(source)
    metadata = file.metadata
    # A constant column takes no space in the file, but as much memory as any other once it is read.
    check_expansion(metadata.num_rows * _BYTES_OF_A_ROW, source.size(), what)
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    check_expansion(sum(max(group.total_byte_size, 0) for group in groups), source.size(), what)
    return file


def bounded_batches(
    source: pa.NativeFile, what: str, columns: Sequence[str] | None = None, num_rows: int = _MOST_ROWS
) -> Iterator[pa.RecordBatch]:
    """Yields batches of at most `num_rows` rows; raises as `open_parquet` does, also if the file expands while read."""
    file = open_parquet(source, what)
    metadata, size = file.metadata, source.size()
    chunks = [
        metadata.row_group(group).column(column).total_uncompressed_size
        for group in range(metadata.num_row_groups)
        for column in range(metadata.num_columns)
    ]
    # Each row may repeat the longest value of its column, so a short file is read a few rows at a time.
    rows = max(_LEAST_ROWS, size >> 12, _BATCH_BYTES // max(1, *chunks, 1))
    num_bytes = 0
    for batch in file.iter_batches(min(rows, num_rows), columns=columns, use_threads=False):
        num_bytes += batch.nbytes
        check_expansion(num_bytes, size, what)
        yield batch


def bounded_table(source: pa.NativeFile, what: str) -> pa.Table:
    """Reads a whole file as one table; raises as `bounded_batches` does."""
    schema = pq.ParquetFile(source).schema_arrow
    return pa.Table.from_batches(bounded_batches(source, what), schema).combine_chunks()
