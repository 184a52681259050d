"""Reads torch files of the format before zip archives, without running anything."""

from __future__ import annotations

import io
from typing import BinaryIO

from raywgen.weights.errors import WeightsError
from raywgen.weights.inert_pickle import InertUnpickler, NotPlainError, Pickled, load_inert

_PROTOCOL = 1001


class LegacyArchive:
    """An open file, which holds three short pickles, the saved object, the keys, and each storage with its length.

    Attributes:
        pickled: The saved object.

    Raises:
        NotPlainError: The file is damaged, or its byte order or format is unknown.
    """

    def __init__(self, file: BinaryIO, source: str) -> None:
        self._file = file
        self._source = source
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        reader = InertUnpickler(file)
        load_inert(reader)
        protocol, system = load_inert(reader), load_inert(reader)
        if protocol != _PROTOCOL or not isinstance(system, dict) or system.get("little_endian") is not True:
            raise NotPlainError("an unknown protocol")
        self.pickled = Pickled(load_inert(reader), reader.calls, bool(reader.storages))
        keys = load_inert(reader)
        if not isinstance(keys, list) or not all(isinstance(key, str) and key in reader.storages for key in keys):
            raise NotPlainError("keys of no storage")
        self._places: dict[str, tuple[int, int]] = {}
        place = file.tell()
        for key in keys:
            storage = reader.storages[key]
            file.seek(place)
            length = int.from_bytes(file.read(8), "little", signed=True)
            if length != storage.num_values or length < 0 or place + 8 + storage.num_bytes > size:
                raise WeightsError(f"{source} is truncated or damaged at storage {key}; fetch it again")
            self._places[key] = (place + 8, storage.num_bytes)
            place += 8 + storage.num_bytes

    def check_storage(self, key: str, num_bytes: int) -> None:
        """Refuses a storage of another size.

        Raises:
            WeightsError: The file does not hold the whole storage.
        """
        if self._places.get(key, (0, -1))[1] != num_bytes:
            raise WeightsError(
                f"{self._source} is damaged: storage {key} does not have {num_bytes} bytes; fetch it again"
            )

    def read_storage(self, key: str, out: memoryview) -> None:
        """Copies the values of a storage."""
        self._file.seek(self._places[key][0])
        if self._file.readinto(out) != len(out):  # pyright: ignore[reportAttributeAccessIssue]
            raise WeightsError(f"{self._source} was cut short while it was read; fetch it again")
