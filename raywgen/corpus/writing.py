"""Locks a folder for one writer, which first removes the half-written files of killed writers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from raywgen.corpus.corpus import Corpus
from raywgen.corpus.shards import WEIGHTS
from raywgen.corpus.storage import CorpusStorage
from raywgen.locks import only_one

JOURNALS = "units"
"""Folder of the journals of finished work items, while a corpus is being written."""
# The names that `Storage` and `in_one_step` give to incomplete files, with the id of the process.
_PARTIAL = re.compile(r".+\.\d+\.partial|\..+\.(arrow|json|md|parquet|safetensors|yaml)\.\d+")


@contextmanager
def writing(root: str | Path) -> Iterator[None]:
    """Holds a folder of networks or a corpus for this process, and removes the leftovers of dead ones.

    Raises:
        InUseError: Another process holds the folder; the message names it.
        OSError, CorpusError: The folder cannot be created or written to.
    """
    with only_one(root, CorpusStorage):
        if "://" not in str(root):
            for folder in (Path(root), Path(root) / WEIGHTS, Path(root) / JOURNALS):
                remove_leftovers(folder)
        yield


def remove_leftovers(folder: Path) -> None:
    """Removes half-written files from a folder that no other process writes to."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if _PARTIAL.fullmatch(path.name) and path.is_file():
            with suppress(FileNotFoundError):
                path.unlink()


def remove_unused_shards(corpus: Corpus) -> None:
    """Removes shards that the manifest does not name, which a killed writer did not commit."""
    wanted = {shard.path for shard in corpus.shards}
    for name in corpus.storage.list(WEIGHTS):
        if f"{WEIGHTS}/{name}" not in wanted:
            corpus.storage.delete(f"{WEIGHTS}/{name}")
