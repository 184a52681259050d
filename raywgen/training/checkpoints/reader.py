"""Reads stored checkpoints: each worker the ranges of values that it needs, and no more."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, Self

import pyarrow as pa
import torch
import xxhash
from torch import Tensor

from raywgen.inputs import UnusableFileError, inside
from raywgen.storage import NoSuchFileError, Storage, UnreadableFileError
from raywgen.training.checkpoints.errors import CheckpointError
from raywgen.training.checkpoints.index import INDEX, CheckpointIndex, TrainState
from raywgen.training.checkpoints.patience import patiently
from raywgen.weights.safetensors_stream import (
    BLOCK_BYTES,
    SafetensorsError,
    StoredTensor,
    blocks_of,
    read_header,
    read_into,
)

_MAX_INDEX_BYTES = 1 << 30


class _Hash(Protocol):
    def update(self, data: Any, /) -> None: ...
    def hexdigest(self) -> str: ...


def new_digest() -> _Hash:
    """Returns the digest by which a part is known."""
    return xxhash.xxh3_128()


class Checkpoint:
    """A stored checkpoint, whose values stay in their files until they are asked for.

    Args:
        storage: The checkpoint's folder.
        index: Its index.
    """

    def __init__(self, storage: Storage, index: CheckpointIndex) -> None:
        self.index = index
        self._storage = storage
        self._opened: dict[int, tuple[pa.NativeFile, dict[str, StoredTensor]]] = {}

    @classmethod
    def open(cls, storage: Storage) -> Self:
        """Reads the index of a checkpoint, and looks whether its files are there and of the right size.

        Raises:
            CheckpointError: A file is missing or damaged, or another version of raywgen wrote it.
        """
        text = _read(storage, INDEX)
        if text is None:
            raise CheckpointError(f"{storage.name}/{INDEX} is missing")
        try:
            index = CheckpointIndex.from_json(text)
        except CheckpointError as error:
            raise CheckpointError(f"{storage.name}/{INDEX} is {error}") from error
        found = cls(storage, index)
        found._check_files()
        return found

    @property
    def state(self) -> TrainState:
        """The position of the run."""
        return self.index.state

    def __contains__(self, name: str) -> bool:
        """Whether it has a tensor of this name."""
        return name in self.index.tensors

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Returns values of a tensor, flat.

        Args:
            name: Name of the tensor.
            start: Number of the first value in the flat tensor.
            stop: Number of the first value that is no longer read; by default all up to the last are.

        Raises:
            CheckpointError: A file is damaged.
        """
        entry = self.index.tensors[name]
        stop = math.prod(entry.shape) if stop is None else stop
        values = torch.empty(max(stop - start, 0), dtype=getattr(torch, entry.dtype))
        for span in entry.spans:
            first, last = max(start, span.start), min(stop, span.stop)
            if first < last:
                source, stored = self._part(span.part)
                try:
                    read_into(source, stored[name], first - span.start, values[first - start : last - start])
                except (SafetensorsError, OSError) as error:
                    raise self._damaged(span.part, error) from error
        return values

    def whole(self, name: str) -> Tensor:
        """Returns a whole tensor."""
        return self.read(name).view(self.index.tensors[name].shape)

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Returns the tensors under a prefix by their names without it; all of them are read."""
        return {name: self.whole(prefix + name) for name in self.index.shapes(prefix)}

    def verify(self, numbers: Iterable[int]) -> None:
        """Reads parts from beginning to end and compares them with their digests; each costs a few MiB of memory.

        Raises:
            CheckpointError: A part is damaged, belongs to another checkpoint, or holds NaN.
        """
        for number in numbers:
            digest, spoilt = new_digest(), ""
            source, _ = self._part(number)
            try:
                for name, block in blocks_of(source):
                    digest.update(block.view(torch.uint8).numpy().data)
                    if not spoilt and block.is_floating_point() and block.isnan().any():
                        spoilt = name
            except (SafetensorsError, OSError) as error:
                raise self._damaged(number, error) from error
            if digest.hexdigest() != self.index.parts[number].digest:
                raise CheckpointError(
                    f"{self._path(number)} is damaged, or belongs to another checkpoint: its digest differs"
                )
            if spoilt:
                raise CheckpointError(f"{self._path(number)} holds NaN in '{spoilt}'")

    def copy_to(self, target: Storage) -> None:
        """Copies the checkpoint into another folder, the file that makes it valid last.

        Raises:
            StorageError, OSError: It cannot be read or written.
        """
        for name in [*(part.file for part in self.index.parts), INDEX]:
            with self._storage.open(name) as source, target.open_output(name) as sink:
                shutil.copyfileobj(source, sink, BLOCK_BYTES)

    def _check_files(self) -> None:
        for number, part in enumerate(self.index.parts):
            try:
                inside(part.file)
            except UnusableFileError as error:
                raise CheckpointError(f"{self._storage.name}/{INDEX} is damaged ({error})") from error
            size = patiently(lambda file=part.file: self._storage.size(file))
            if size is None:
                raise CheckpointError(f"{self._path(number)} is missing")
            if size != part.num_bytes:
                raise CheckpointError(f"{self._path(number)} is damaged: it has {size} bytes and not {part.num_bytes}")

    def _part(self, number: int) -> tuple[pa.NativeFile, dict[str, StoredTensor]]:
        if number not in self._opened:
            try:
                source = patiently(lambda: self._storage.open(self.index.parts[number].file))
                stored = read_header(source)
            except NoSuchFileError as error:
                raise CheckpointError(f"{self._path(number)} is missing") from error
            except (ValueError, OSError) as error:
                raise self._damaged(number, error) from error
            self._check_slices(number, stored)
            self._opened[number] = source, stored
        return self._opened[number]

    def _check_slices(self, number: int, stored: Mapping[str, StoredTensor]) -> None:
        """Refuses a part whose slices are not those of the index."""
        for name, entry in self.index.tensors.items():
            for span in entry.spans:
                if span.part != number:
                    continue
                found = stored.get(name)
                size = None if found is None else (str(found.dtype), math.prod(found.shape))
                if size != (f"torch.{entry.dtype}", span.stop - span.start):
                    raise CheckpointError(
                        f"{self._path(number)} belongs to another checkpoint: its slice of '{name}' is another one"
                    )

    def _damaged(self, number: int, error: Exception) -> Exception:
        return _damaged(self._storage, self._path(number), error)

    def _path(self, number: int) -> str:
        return f"{self._storage.name}/{self.index.parts[number].file}"


def _read(storage: Storage, relative: str) -> bytes | None:
    """Reads a small file; None if it is missing."""
    try:
        size = patiently(lambda: storage.size(relative))
        if size is not None and size > _MAX_INDEX_BYTES:
            raise CheckpointError(f"{storage.name}/{relative} is damaged: it has {size} bytes")
        return patiently(lambda: storage.read(relative))
    except NoSuchFileError:
        return None
    except CheckpointError:
        raise
    except (ValueError, OSError) as error:
        raise _damaged(storage, f"{storage.name}/{relative}", error) from error


def _damaged(storage: Storage, path: str, error: Exception) -> Exception:
    """Returns the error to raise: where a remote storage does not answer, nothing is known of the checkpoint."""
    is_unreachable = not storage.is_local and isinstance(error, (OSError, UnreadableFileError))
    return error if is_unreachable else CheckpointError(f"{path} is damaged ({error})")
