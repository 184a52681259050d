"""The bytes that a corpus of files comes to hold, from below, so that a disk without room is noticed at once."""

from __future__ import annotations

from collections.abc import Sequence

from raywgen.corpus.ingest import IngestItem, journal, read_journal
from raywgen.corpus.sources import SourceCheckpoint
from raywgen.corpus.storage import CorpusStorage
from raywgen.corpus.writing import JOURNALS
from raywgen.out_folder import check_room, has_room
from raywgen.weights.reader import WeightsReader


def check_corpus_room(items: Sequence[IngestItem], out: str) -> None:
    """Refuses a folder whose disk has no room for the weights of all items.

    Files are opened, for the description of their tensors alone, where there is no room for all that is in them.

    Raises:
        OutError: There is no room.
        CorpusError: A journal is damaged.
    """
    if has_room(out, sum(item.num_bytes for item in items)):
        return
    storage, readers = CorpusStorage.at(out), dict[tuple[str, ...], WeightsReader]()
    kept, num_bytes = set(storage.list(JOURNALS)), 0
    for item in items:
        if journal(item.name).rpartition("/")[2] in kept:
            num_bytes += sum(shard.num_bytes for shard in read_journal(storage, item.name).shards)
        else:
            num_bytes += sum(_least_bytes(checkpoint, readers) for checkpoint in item.checkpoints)
    check_room(out, num_bytes, "if no checkpoint is refused")


def _least_bytes(checkpoint: SourceCheckpoint, readers: dict[tuple[str, ...], WeightsReader]) -> int:
    """Returns the bytes of a checkpoint's weights; 0 for files that would have to be fetched first."""
    if checkpoint.stored_id is not None:
        return checkpoint.num_bytes
    reader = readers.setdefault(checkpoint.select, WeightsReader(checkpoint.select))
    return sum(reader.least_bytes(file) for file in checkpoint.files if "://" not in file)
