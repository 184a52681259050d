"""Images that are still encoded, in Parquet files and folders, read block by block.

Shape legend: S chosen images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import pyarrow as pa
from pyarrow import fs

from raywgen.tasks.base import TaskError
from raywgen.tasks.text_datasets import LabelledTable

Encoded = tuple[str, bytes]
"""The place of an image in words, and the bytes of its file."""
_ENDINGS = (".png", ".jpg", ".jpeg")
_ROWS_OF_A_BLOCK = 1024


class EncodedImages(Protocol):
    """Images that are still encoded."""

    def files(self) -> list[fs.FileInfo]:
        """Returns the files that hold them."""
        ...

    def encoded(self, chosen_S: np.ndarray) -> Iterator[list[Encoded]]:
        """Yields the chosen rows, which ascend, in blocks."""
        ...


class TableImages:
    """Images in a column of Parquet files.

    Attributes:
        tables: The files.
        column: Name of the column.

    Raises:
        TaskError: There is no such column, or it holds no encoded images.
    """

    def __init__(self, tables: list[LabelledTable]) -> None:
        self.tables = tables
        self.column = tables[0].column("image", "Image")
        for table in tables:
            kind = table.schema.field(table.column(self.column)).type
            if not holds_bytes(kind):
                raise TaskError(f"{table.info.path}: '{self.column}' is {kind}; store encoded PNG or JPEG bytes in it")

    def __len__(self) -> int:
        return sum(table.num_rows for table in self.tables)

    def files(self) -> list[fs.FileInfo]:
        """Returns the files."""
        return [table.info for table in self.tables]

    def encoded(self, chosen_S: np.ndarray) -> Iterator[list[Encoded]]:
        """Yields the chosen rows, which ascend, in blocks.

        Raises:
            TaskError: A file is damaged, or a row has no image.
        """
        wanted_S = np.zeros(len(self), dtype=bool)
        wanted_S[chosen_S] = True
        done = 0
        for table in self.tables:
            first = done
            for batch in table.batches([self.column], _ROWS_OF_A_BLOCK):
                places = np.flatnonzero(wanted_S[done : done + len(batch)])
                images = batch.column(0).take(pa.array(places)).to_pylist()
                done += len(batch)
                wheres = (f"{table.info.path} row {done - len(batch) - first + place}" for place in places)
                yield [(where, _file_bytes(image, where)) for where, image in zip(wheres, images, strict=True)]


class FolderImages:
    """Image files in folders.

    Args:
        filesystem: The file system.
        root: The folder that the user named, for messages.
        folders: The folders that hold the files.
        wanted: What the root should hold, for messages.

    Attributes:
        infos: The files, in the order of their paths.

    Raises:
        TaskError: There are none, or one is no regular file.
    """

    def __init__(self, filesystem: fs.FileSystem, root: str, folders: Sequence[str], wanted: str) -> None:
        self._filesystem = filesystem
        infos = [info for folder in folders for info in listed(filesystem, folder)]
        pictures = [info for info in infos if info.path.lower().endswith(_ENDINGS)]
        if strange := [info.path for info in pictures if not info.is_file]:
            raise TaskError(f"{strange[0]} is no regular file; remove it")
        if not pictures:
            raise TaskError(f"{root} holds no {wanted}; give a folder that does, or a Parquet file")
        self.infos = sorted(pictures, key=lambda info: info.path)

    def __len__(self) -> int:
        return len(self.infos)

    def files(self) -> list[fs.FileInfo]:
        """Returns the files."""
        return self.infos

    def encoded(self, chosen_S: np.ndarray) -> Iterator[list[Encoded]]:
        """Yields the chosen files, in blocks.

        Raises:
            TaskError: A file cannot be read.
        """
        for first in range(0, len(chosen_S), _ROWS_OF_A_BLOCK):
            paths = [self.infos[row].path for row in chosen_S[first : first + _ROWS_OF_A_BLOCK]]
            yield [(path, self._read(path)) for path in paths]

    def _read(self, path: str) -> bytes:
        try:
            with self._filesystem.open_input_stream(path) as file:
                return file.read()
        except OSError as error:
            raise TaskError(f"{path} cannot be read ({error}); mend or remove it") from error


def listed(filesystem: fs.FileSystem, folder: str) -> list[fs.FileInfo]:
    """Returns what lies in a folder."""
    return filesystem.get_file_info(fs.FileSelector(folder))


def holds_bytes(kind: pa.DataType) -> bool:
    """Whether a column holds encoded files: their bytes, or records with their bytes."""
    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and holds_bytes(kind.field(place).type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _file_bytes(image: dict | bytes | None, where: str) -> bytes:
    content = image.get("bytes") if isinstance(image, dict) else image
    if not content:
        raise TaskError(f"{where} has no image bytes; store the encoded file in the table, or drop the row")
    return content
