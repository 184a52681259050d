"""Local copies of bundles that lie in an object store or on the Hugging Face hub, since their files are mapped.

A copy is named by its config, which holds the checksums of all files, so it serves every process of the machine.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raywgen.extras import hub_needed
from raywgen.inputs import UnusableFileError, inside
from raywgen.locations import joined
from raywgen.sealed import SealError, unseal
from raywgen.storage import NoSuchFileError, Storage, StorageError
from raywgen.weights.cache import FOLDER, cache_folder

CONFIG = "generator.json"
HUB = "hf://"
_ON_HUB = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+?)(@(?P<revision>[^/@]+))?(?P<inside>(/[^/@]+)*)/?")
_NOT_FETCHED = ["checkpoints/*", "snapshots/*", "tensorboard/*", "tokens/*", "*.py", "*.bin", "*.pt", "*.pkl"]


class BundleError(ValueError):
    """A folder holds no usable generator; the message names what is missing."""


def local_bundle(location: str | Path) -> Path:
    """Returns a local folder with the files of a bundle, which are copied once where they lie elsewhere.

    Args:
        location: A local path, a URI of an object store, or `hf://owner/name`, with a revision as `@revision` and
            folders behind it.

    Raises:
        BundleError: There is no bundle, or it cannot be copied.
    """
    text = str(location)
    if "://" not in text:
        return Path(text)
    if text.startswith(HUB):
        return _from_hub(text)
    try:
        storage = Storage.at(text)
        return Path(storage.root) if storage.is_local else _copy(storage)
    except (StorageError, OSError) as error:
        raise BundleError(f"{text} cannot be read: {error}") from error


@contextmanager
def opened_bundle(location: str | Path) -> Iterator[Path]:
    """Yields what `local_bundle` returns; errors within the block name the location in place of a copy of it."""
    folder = local_bundle(location)
    try:
        yield folder
    except BundleError as error:
        if str(folder) in (text := str(error)) and "://" in str(location):
            raise type(error)(text.replace(str(folder), str(location))) from error
        raise


def is_elsewhere(location: str | Path) -> bool:
    """Whether a generator lies in an object store or on the hub, so that to look for it takes the network."""
    return "://" in str(location) and not str(location).startswith("file://")


def is_bundle(location: str | Path) -> bool:
    """Whether there is a bundle at a local path or a URI.

    Raises:
        BundleError: The object store or the hub cannot be read.
    """
    text = str(location)
    if text.startswith(HUB):
        return (_from_hub(text) / CONFIG).is_file()
    try:
        return Storage.at(text).size(CONFIG) is not None
    except (StorageError, OSError) as error:
        raise BundleError(f"{text} cannot be read: {error}") from error


def bundle_folder(path: str | Path) -> str:
    """Returns the bundle's folder within a run folder; a bundle's own folder is returned as it is.

    Raises:
        BundleError: There is no bundle, or the object store cannot be read.
    """
    if not str(path).strip():
        raise BundleError("the generator is empty; give the run folder of `raywgen train`, such as runs/igpg")
    candidates = [joined(path, "generator"), str(path)]
    if str(path).startswith(HUB):
        candidates.reverse()  # A name of a repository that is none is said as it is.
    for candidate in candidates:
        if is_bundle(candidate):
            return candidate
    raise BundleError(f"{path} holds no trained generator; train one by `raywgen train`, or wait until it is done")


def _copy(storage: Storage) -> Path:
    try:
        content = storage.read(CONFIG)
    except NoSuchFileError as error:
        raise BundleError(
            f"{storage.name} holds no {CONFIG}: it is no generator; train one by `raywgen train`"
        ) from error
    folder = cache_folder() / f"bundle-{hashlib.sha256(content).hexdigest()[:32]}"
    names = _names(storage, content)
    if all(_is_same(storage, folder, name) for name in names):
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name in names:
            storage.download(name, partial / name)
        partial.rename(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not folder.is_dir():  # Another process may have made the same copy.
            raise BundleError(
                f"{storage.name} cannot be copied to {folder} ({error}); free some disk space, or name another folder "
                f"by {FOLDER}"
            ) from error
    return folder


def _is_same(storage: Storage, folder: Path, name: str) -> bool:
    """Whether a file of a copy is as long as the original; whoever loads the bundle compares checksums."""
    path = folder / name
    return path.is_file() and path.stat().st_size == storage.size(name)


def _names(storage: Storage, content: bytes) -> list[str]:
    """Returns the files of a bundle: those that its config names, or all where an older version wrote it."""
    try:
        named = unseal(content, is_required=False).get("files")
        return [CONFIG, *map(inside, named)] if isinstance(named, dict) else storage.walk()
    except (SealError, UnusableFileError) as error:
        raise BundleError(f"{storage.name}/{CONFIG} is damaged ({error}); restore it from a copy") from error


def _from_hub(text: str) -> Path:
    found = _ON_HUB.fullmatch(text)
    if found is None:
        raise BundleError(f"{text} names no repository; write hf://owner/name, or hf://owner/name@revision/folder")
    repository = f"{HUB}{found['repo']}"
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise BundleError(
            f"{hub_needed(repository, 'huggingface_hub')}, or download the files and give their folder"
        ) from error
    try:
        folder = snapshot_download(found["repo"], revision=found["revision"], ignore_patterns=_NOT_FETCHED)
    except Exception as error:  # The hub's client raises errors of several libraries.
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise BundleError(
            f"{repository} cannot be fetched ({reason}); check the name, the connection and, if it is private, HF_TOKEN"
        ) from error
    return Path(folder) / found["inside"].strip("/")
