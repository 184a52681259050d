"""Lists a local folder and follows symbolic links; every folder is entered once."""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from raywgen.corpus.aside import PASSED_OVER, REFUSED


@dataclass(frozen=True, slots=True)
class File:
    """A regular file of a listing.

    Attributes:
        size: Number of bytes.
        changed: When it was last changed, from the file system.
        real: Its path without links, or another identity of the file.
        is_link: Whether it was reached through a link.
    """

    size: int
    changed: str
    real: str
    is_link: bool


@dataclass(slots=True)
class Listing:
    """The content of a folder.

    Attributes:
        files: Files by their path below the folder.
        aside: Entries that are not listed: path, reason, kind.
        skipped: Folders that were not entered.
    """

    files: dict[PurePosixPath, File] = field(default_factory=dict)
    aside: list[tuple[PurePosixPath, str, str]] = field(default_factory=list)
    skipped: set[PurePosixPath] = field(default_factory=set)


def walk(root: str, enters: Callable[[PurePosixPath], bool]) -> Listing:
    """Lists real folders first and links to folders afterwards, so that a file has its real name if possible.

    Args:
        root: The folder to list.
        enters: Returns whether a folder, given by its path below the root, is to be listed.
    """
    listing = Listing()
    real = os.path.realpath(root)
    seen = {_identity(os.stat(root))}
    above = _above(real)
    folders = deque([_Folder(PurePosixPath(), root, real, is_link=False)])
    links: list[tuple[PurePosixPath, str]] = []
    while folders or links:
        if folders:
            folder = folders.popleft()
            for child, identity in _list(folder, listing, links):
                if not enters(child.path):
                    listing.skipped.add(child.path)
                    continue
                if identity in seen:
                    listing.aside.append((child.path, "is a folder that is listed under another name", PASSED_OVER))
                else:
                    seen.add(identity)
                    folders.append(child)
            continue
        links.sort(reverse=True)
        path, place = links.pop()
        if not enters(path):
            listing.skipped.add(path)
            continue
        target = os.path.realpath(place)
        identity = _identity(os.stat(target))
        if identity in seen or identity in above:
            reason = "holds this folder" if identity in above else "is listed under another name"
            listing.aside.append((path, f"is a link to {target}, which {reason}", PASSED_OVER))
        else:
            seen.add(identity)
            folders.append(_Folder(path, place, target, is_link=True))
    return listing


@dataclass(frozen=True, slots=True)
class _Folder:
    path: PurePosixPath
    place: str
    real: str
    is_link: bool


def _list(
    folder: _Folder, listing: Listing, links: list[tuple[PurePosixPath, str]]
) -> list[tuple[_Folder, tuple[int, int]]]:
    """Adds a folder's files and links to the listing, and returns its subfolders with their identities."""
    folders = []
    try:
        entries = sorted(os.scandir(folder.place), key=lambda entry: entry.name)
    except OSError as error:
        listing.aside.append((folder.path, f"cannot be listed ({error.strerror}); check its permissions", REFUSED))
        return []
    for entry in entries:
        child = folder.path / entry.name
        if not _is_text(entry.name):
            shown = folder.path / os.fsencode(entry.name).decode(errors="replace")
            listing.aside.append((shown, "has a name that is not UTF-8; rename it", REFUSED))
            continue
        try:
            status = entry.stat()
        except FileNotFoundError:
            what = (
                f"is a link to {os.readlink(entry.path)}" if entry.is_symlink() else "was removed while it was listed"
            )
            listing.aside.append((child, f"{what}, which is not there; fetch it again", REFUSED))
            continue
        except OSError as error:  # a link to itself, a folder that may not be entered
            listing.aside.append((child, f"cannot be read ({error.strerror}); check it and its permissions", REFUSED))
            continue
        linked = entry.is_symlink()
        if stat.S_ISDIR(status.st_mode):
            if linked:
                links.append((child, entry.path))
            else:
                inside = _Folder(child, entry.path, f"{folder.real}/{entry.name}", folder.is_link)
                folders.append((inside, _identity(status)))
        elif stat.S_ISREG(status.st_mode):
            origin = os.path.realpath(entry.path) if linked else f"{folder.real}/{entry.name}"
            is_link = folder.is_link or linked
            listing.files[child] = File(status.st_size, str(status.st_mtime_ns), origin, is_link)
        else:
            listing.aside.append((child, "is a pipe, socket or device, and no file", PASSED_OVER))
    return folders


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _above(real: str) -> set[tuple[int, int]]:
    above = set()
    while (parent := os.path.dirname(real)) != real:
        real = parent
        above.add(_identity(os.stat(real)))
    return above
