"""Copies of remote shards on the local disk, where they can be memory-mapped.

A copy is named by its checksum, so it serves every process of the machine and every corpus that holds the shard.
"""

from __future__ import annotations

import os

from pyarrow import fs

from raywgen.corpus.errors import RESTORE, CorpusError, DamagedFileError
from raywgen.corpus.shards import Shard
from raywgen.corpus.storage import CorpusStorage
from raywgen.weights.cache import FOLDER, cache_folder


def local_copy(storage: CorpusStorage, shard: Shard) -> tuple[CorpusStorage, str]:
    """Returns storage and path of a shard that can be mapped: itself if it is local, else a copy that is fetched once.

    Raises:
        MissingFileError: The shard is missing.
        DamagedFileError: The shard has another checksum than the manifest says.
        CorpusError: The disk is full.
    """
    if storage.is_local:
        return storage, shard.path
    try:
        folder = cache_folder()
    except OSError as error:
        raise CorpusError(f"{storage.name}/{shard.path} cannot be copied: {error}") from error
    cache, name = CorpusStorage.at(folder), f"{shard.sha256}.arrow"
    if cache.size(name) == shard.num_bytes:
        return cache, name
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with storage.open(shard.path):
            pass  # Raises a clear error if the shard is missing.
        partial = folder / f".{name}.{os.getpid()}"
        fs.copy_files(
            storage.path(shard.path),
            str(partial),
            source_filesystem=storage.filesystem,
            destination_filesystem=fs.LocalFileSystem(),
        )
    except OSError as error:
        raise CorpusError(
            f"{storage.name}/{shard.path} cannot be copied to {folder} ({error}); free some disk space, or "
            f"name another folder by {FOLDER}"
        ) from error
    if cache.sha256(partial.name) != shard.sha256:
        partial.unlink()
        raise DamagedFileError(f"{storage.name}/{shard.path} has another checksum than the manifest says; {RESTORE}")
    partial.replace(folder / name)
    return cache, name
