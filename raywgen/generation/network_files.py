"""Files of networks whose values come in pieces, or that are cut into several files.

They are written at their places under temporary names and get their own when all values are there: in the folder
itself, or for an object store in a folder of this machine, from which they are then copied.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from raywgen.corpus.storage import CorpusStorage
from raywgen.files import remedy, sync_folder
from raywgen.sealed import file_checksum
from raywgen.weights import Layout
from raywgen.weights.errors import WeightsError
from raywgen.weights.safetensors_parts import (
    TensorFile,
    index_json,
    layout_ties,
    tensor_files,
    values_checksum,
)

INDEX_OF_FILES = "model.safetensors.index.json"
_LONGEST_LOG_PROB = "-" + "0" * 24


@dataclass(frozen=True, slots=True)
class NetworkFile:
    """A network that is being written.

    Attributes:
        name: Its name, without an ending.
        key: Distinguishes it from all others of the run, in the names of its unfinished files.
        layout: Its layout.
        metadata: Metadata of its files; where the log-probability is not known yet, it is any number.
    """

    name: str
    key: str
    layout: Layout
    metadata: Mapping[str, str]


class NetworkFiles:
    """Writes networks piece by piece.

    Args:
        storage: The folder for the networks.
        unfinished: Folder, in `storage`, of unfinished files.
        digest: Distinguishes the run from others.
        max_bytes: Most bytes of the tensors of a file; 0 for any number.
    """

    def __init__(self, storage: CorpusStorage, unfinished: str, digest: str, max_bytes: int) -> None:
        self._storage, self._digest, self._max_bytes = storage, digest, max_bytes
        self._folder = Path(storage.path(unfinished)) if storage.is_local else _folder_on_this_machine(storage, digest)
        self._files: dict[str, list[TensorFile]] = {}

    def are_several(self, layout: Layout) -> bool:
        """Whether networks of a layout are cut into several files."""
        return self._max_bytes > 0 and len(tensor_files(layout, {}, self._max_bytes)) > 1

    def write(self, network: NetworkFile, start: int, values_X: Tensor) -> str:
        """Writes values of a network, from value `start` on, and returns their checksum.

        Raises:
            WeightsError: The disk is full, or the folder cannot be written. All earlier pieces stay.
        """
        digest = hashlib.sha256()
        with self._errors(network):
            for file, path in zip(self._tensor_files(network), self._paths(network), strict=True):
                if not path.is_file() or path.stat().st_size != file.num_bytes:
                    file.create(path)
                file.write_values(path, start, values_X, digest.update)
        return digest.hexdigest()

    def holds(self, network: NetworkFile, start: int, stop: int, checksum: str) -> bool:
        """Whether the unfinished files hold the values that gave this checksum."""
        files, paths = self._tensor_files(network), self._paths(network)
        sizes = [path.stat().st_size if path.is_file() else -1 for path in paths]
        if sizes != [file.num_bytes for file in files]:
            return False
        with self._errors(network):
            return values_checksum(files, paths, start, stop) == checksum

    def finish(
        self, network: NetworkFile, kept: Mapping[str, Tensor], metadata: Mapping[str, str]
    ) -> tuple[str, dict[str, str]]:
        """Gives the files of a network their names, when all values are there.

        Args:
            network: The network.
            kept: The tensors that no generator writes.
            metadata: Final metadata.

        Returns:
            The file that stands for the network, and the checksum of each file by its name.

        Raises:
            WeightsError, CorpusError: The folder cannot be written.
        """
        files, paths = self._tensor_files(network), self._paths(network)
        names = self._names(network, len(files))
        with self._errors(network):
            for file, path in zip(files, paths, strict=True):
                file.finish(path, kept, dict(metadata) | layout_ties(network.layout))
            checksums = {name: file_checksum(path) for name, path in zip(names, paths, strict=True)}
            for name, path in zip(names, paths, strict=True):
                self._place(path, name)
        if len(files) == 1:
            return names[0], checksums
        index = f"{network.name}/{INDEX_OF_FILES}"
        content = index_json([name.rpartition("/")[2] for name in names], files).encode()
        checksums[index] = self._storage.write(index, content)
        return index, checksums

    def clear(self) -> None:
        """Removes unfinished files from this machine; those in the folder itself are removed with it."""
        if not self._storage.is_local:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _place(self, path: Path, name: str) -> None:
        if not self._storage.is_local:
            self._storage.upload(path, name)
            path.unlink()
            return
        target = Path(self._storage.path(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
        sync_folder(target.parent)

    def _names(self, network: NetworkFile, num: int) -> list[str]:
        if num == 1:
            return [f"{network.name}.safetensors"]
        return [f"{network.name}/model-{place:05d}-of-{num:05d}.safetensors" for place in range(1, num + 1)]

    def _paths(self, network: NetworkFile) -> list[Path]:
        num = len(self._tensor_files(network))
        return [self._folder / f"{self._digest}-{network.key}-{place}.partial" for place in range(num)]

    def _tensor_files(self, network: NetworkFile) -> list[TensorFile]:
        if network.key not in self._files:
            metadata = dict(network.metadata)
            if "log_prob" in metadata:
                metadata["log_prob"] = _LONGEST_LOG_PROB
            self._files[network.key] = tensor_files(network.layout, metadata, self._max_bytes)
        return self._files[network.key]

    @contextmanager
    def _errors(self, network: NetworkFile) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise WeightsError(
                f"cannot write {self._storage.name}/{network.name}.safetensors: {error.strerror or error}; "
                f"{remedy(error)} and run the same command again, which goes on from there"
            ) from error


def _folder_on_this_machine(storage: CorpusStorage, digest: str) -> Path:
    """Returns a folder of the user's own for the unfinished files of a run, the same for every process.

    Raises:
        WeightsError: Somebody else holds a folder of that name.
    """
    place = hashlib.sha256(f"{storage.name} {digest}".encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"raywgen-{place}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise WeightsError(f"{folder} belongs to somebody else; set TMPDIR to a folder of your own")
    return folder
