"""Writes a checkpoint: each worker its part, and the first one the index once all parts are durable."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from raywgen.sealed import SealError
from raywgen.storage import NoSuchFileError, Storage
from raywgen.training.checkpoints.errors import CheckpointError
from raywgen.training.checkpoints.index import INDEX, CheckpointIndex, PartEntry, TrainState, WrittenPart
from raywgen.training.checkpoints.patience import patiently
from raywgen.training.checkpoints.reader import new_digest
from raywgen.training.checkpoints.slices import Slice
from raywgen.weights.safetensors_stream import StreamedTensor, write_stream

_PATIENCE_SECONDS = 600.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0


def write_part(
    storage: Storage, folder: str, slices: Mapping[str, Slice], rank: int, num_workers: int, launch: str
) -> WrittenPart:
    """Writes the part of one worker, and beside it what is in it, for the first worker.

    Raises:
        StorageError, OSError: It cannot be written.
    """
    stem = f"part-{rank:05d}-of-{num_workers:05d}"

    def write() -> WrittenPart:
        digest, size = new_digest(), 0
        with storage.open_output(f"{folder}/{stem}.safetensors") as sink:

            def write_block(block: Any) -> None:
                nonlocal size
                digest.update(block)
                size += sink.write(block)

            tensors = {name: StreamedTensor.of(part.values) for name, part in slices.items()}
            write_stream(write_block, tensors, {"kind": "raywgen checkpoint"})
        content = {
            name: (str(part.values.dtype).removeprefix("torch."), part.shape, part.start, part.stop)
            for name, part in slices.items()
        }
        return WrittenPart(PartEntry(f"{stem}.safetensors", size, digest.hexdigest()), content)

    written = patiently(write)
    if num_workers > 1:
        patiently(lambda: storage.write(f"{folder}/{stem}.json", written.to_json(launch).encode()))
    return written


def forget_old_index(storage: Storage, folder: str) -> None:
    """Makes a checkpoint of the same position invalid, which lies there because the run had to go back before it."""
    patiently(lambda: storage.delete(f"{folder}/{INDEX}"))


def write_index(
    storage: Storage, folder: str, state: TrainState, own: WrittenPart, num_workers: int, launch: str
) -> None:
    """Waits until all parts are durable, writes the index, and removes what does not belong to the checkpoint.

    Raises:
        CheckpointError: A worker has not written its part.
        StorageError, OSError: The index cannot be written.
    """
    parts = [own, *(_awaited(storage, folder, rank, num_workers, launch) for rank in range(1, num_workers))]
    index = CheckpointIndex.of(state, parts)
    patiently(lambda: storage.write(f"{folder}/{INDEX}", index.to_json().encode()))
    files = {INDEX, *(part.file for part in index.parts)}
    for name in storage.list(folder):
        if name not in files:
            storage.delete(f"{folder}/{name}")


def _awaited(storage: Storage, folder: str, rank: int, num_workers: int, launch: str) -> WrittenPart:
    """Returns what another worker has written, as soon as it has."""
    name = f"{folder}/part-{rank:05d}-of-{num_workers:05d}.json"
    for _ in _pauses():
        try:
            if (found := WrittenPart.from_json(patiently(lambda: storage.read(name)), launch)) is not None:
                return found
        except (NoSuchFileError, SealError):
            pass  # It is still to come.
    raise CheckpointError(f"worker {rank} has not written its part within {_PATIENCE_SECONDS:.0f} seconds")


def _pauses() -> Iterator[None]:
    end, pause = time.monotonic() + _PATIENCE_SECONDS, _FIRST_PAUSE
    while time.monotonic() < end:
        yield
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
