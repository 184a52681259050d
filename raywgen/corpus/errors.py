"""Errors of corpora; each message names the file and the remedy."""

from __future__ import annotations

from raywgen.storage import NoSuchFileError, StorageError, UnreadableFileError


class CorpusError(StorageError):
    """A corpus that cannot be read or written."""


class MissingFileError(CorpusError, NoSuchFileError):
    """A file that the manifest names is not there."""


class DamagedFileError(CorpusError, UnreadableFileError):
    """A file that is truncated, has another checksum, or cannot be parsed."""


class ChangedCorpusError(CorpusError):
    """A corpus that another process deleted or rebuilt during the read."""


class FetchError(CorpusError):
    """A file of a remote source that cannot be fetched."""


class UnknownFactError(KeyError):
    """A query names a fact that checkpoints do not have."""

    def __str__(self) -> str:
        return str(self.args[0])


RESTORE = "restore it or build the corpus again; `raywgen corpus verify` names all that is damaged"
