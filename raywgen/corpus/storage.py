"""The folder of a corpus, whose errors say how a corpus is restored."""

from __future__ import annotations

from raywgen.corpus.errors import RESTORE, CorpusError, DamagedFileError, MissingFileError
from raywgen.storage import Storage

MANIFEST = "manifest.json"


class CorpusStorage(Storage):
    """The folder of a corpus."""

    failure = CorpusError
    missing = MissingFileError
    unreadable = DamagedFileError
    restore = RESTORE

    def check_manifest(self) -> None:
        """Refuses a folder without a manifest, which is no corpus.

        Raises:
            MissingFileError: There is none.
        """
        if self.size(MANIFEST) is None:
            raise MissingFileError(
                f"{self.name} holds no {MANIFEST}: it is no corpus; "
                "make one by `raywgen corpus build` or `raywgen zoo train`"
            )
