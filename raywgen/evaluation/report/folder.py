"""The folder that a page is about: its files, links to them, and commands that name them."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from raywgen.config import ConfigError, read_yaml
from raywgen.inputs import MAX_YAML_BYTES, read_regular
from raywgen.locations import joined
from raywgen.mirror import working_folder
from raywgen.storage import Storage

CONFIG = "config.yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """The name of something, its path or URI as it was given, and a link to it (empty where there can be none)."""

    name: str
    path: str
    link: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command that can be pasted, and what it does."""

    what: str
    line: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """A folder that a page is about.

    Attributes:
        location: The folder as the user gave it, a local path or a URI.
        root: A local folder that holds all its files which a page is made of.
        storage: The folder itself.
    """

    location: str
    root: Path
    storage: Storage

    @property
    def name(self) -> str:
        """The folder's own name."""
        return Path(self.storage.root).resolve().name

    def at(self, relative: str) -> str:
        """Returns the location of a file or folder in this one, as a user would give it."""
        return joined(self.location, relative) if relative else self.location

    def lies_in(self, path: str) -> bool:
        """Whether a file or folder of a path's name lies in this folder."""
        name = Path(path).name
        return bool(name) and "://" not in path and self.storage.exists(name)

    def holds(self, relative: str) -> bool:
        """Whether a file of the page lies in the folder; a link could bring any file of this machine into the page."""
        path = self.root / relative
        return path.is_file() and path.resolve().is_relative_to(self.root.resolve())

    def files(self, name: str) -> list[Path]:
        """Returns all files of a name in this folder and those below it, in order."""
        found = sorted(self.root.rglob(name))
        return [path for path in found if self.holds(str(path.relative_to(self.root)))]

    def text(self, relative: str) -> str | None:
        """Returns a short file's text; None where there is no such file."""
        if not self.holds(relative):
            return None
        return read_regular(self.root / relative, MAX_YAML_BYTES).decode(errors="replace")

    def settings(self, relative: str = CONFIG) -> Mapping[str, object]:
        """Returns the top level of a YAML file as it stands; empty where there is none that can be read."""
        try:
            return read_yaml(self.root / relative) if self.holds(relative) else {}
        except (ConfigError, OSError):
            return {}

    def place(self, name: str, path: str) -> Place:
        """Returns a place; a path is taken from this folder on, or from where the user is.

        The link is relative, so that it still leads there when the folder is moved (with what lies outside, for a path
        outside). Nothing is linked that does not exist, and no other machine's file.
        """
        if "://" in path:
            return Place(name=name, path=path, link="")
        if not os.path.isabs(path) and self.storage.exists(path):
            return Place(name=name, path=path, link=quote(path))
        if self.storage.is_local and Path(path).exists():
            return Place(name=name, path=path, link=quote(os.path.relpath(path, self.storage.root)))
        return Place(name=name, path=path, link="")


@contextmanager
def opened(location: str | Path, *names: str) -> Iterator[Folder]:
    """Yields a folder to make a page of.

    Args:
        location: A local path or a URI.
        names: Names of the files that the page is made of, in the folder or anywhere below it; those of an object store
            are copied.

    Raises:
        StorageError: The folder cannot be read.
    """
    storage = Storage.at(location)
    wanted = [] if storage.is_local else [name for name in storage.walk() if name.rpartition("/")[2] in names]
    with working_folder(location, *wanted) as root:
        yield Folder(location=str(location), root=root, storage=storage)


def command(what: str, *words: str) -> Command:
    """Returns a command of raywgen, quoted for a shell."""
    return Command(what=what, line=shlex.join(["raywgen", *words]))


def text_of(settings: Mapping[str, object], key: str) -> str:
    """Returns a setting that is a text; empty where it is none."""
    value = settings.get(key)
    return value if isinstance(value, str) else ""
