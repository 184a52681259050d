"""The folder of a corpus, whose errors say how a corpus is restored."""

from __future__ import annotations

from raywgen.corpus.errors import RESTORE, CorpusError, DamagedFileError, MissingFileError
from raywgen.storage import Storage


class CorpusStorage(Storage):
    """The folder of a corpus."""

    failure = CorpusError
    missing = MissingFileError
    unreadable = DamagedFileError
    restore = RESTORE
