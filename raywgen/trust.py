"""Decides what may be imported or contacted: only what the user named, never what came as data.

A recipe, an encoder or a method in a corpus, a bundle or a run folder is data. Its name is looked up in the registries.
It leads to an import or a connection only if the user named that package or address: by `trusting`, by `--trust` on the
command line, or in a config of their own (see `entry_point`).
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.machinery
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

HUB = "hf:"
_PACKAGE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_IMPORT_PATH = re.compile(r"([A-Za-z_][\w.]*):[A-Za-z_]\w*")
_ADDRESS = re.compile(r"[A-Za-z][\w+.-]*://[^/?#]+.*|hf:.+|/.+")
# Keys whose texts are prose, and never opened.
_WORDS = ("instruction",)


class UntrustedError(ValueError):
    """Data names something to import or to contact that the user did not name; the message says how to allow it."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Source:
    """The source of the data that is being read.

    Attributes:
        name: Path or URI, for messages.
        folder: Files outside of this folder are not opened; empty for any local file.
    """

    name: str = ""
    folder: str = ""


_TRUSTED: ContextVar[frozenset[str]] = ContextVar("trusted", default=frozenset())
_SOURCE: ContextVar[_Source | None] = ContextVar("source", default=None)
_BESIDE: ContextVar[str] = ContextVar("beside", default="")


class StoredRecipe(dict[str, Any]):
    """A recipe that came as data, and is built within bounds.

    Attributes:
        source: Path or URI of the file that holds it, for messages.
        num_stored: Number of values stored for the network that it builds; 0 if unknown.
    """

    source: str = ""
    num_stored: int = 0

    @classmethod
    def of(cls, recipe: Mapping[str, object], source: str, num_stored: int = 0) -> StoredRecipe:
        """Returns a copy that records its source."""
        stored = cls(recipe)
        stored.source, stored.num_stored = source, num_stored
        return stored


@contextmanager
def trusting(*names: str) -> Iterator[None]:
    """Allows data to import from these packages and to contact these addresses within the block.

    Args:
        names: Packages such as `mynets`, which includes `mynets.vision`; addresses such as `hf:NAME` or `s3://bucket`,
            which includes all below it; absolute paths of folders.

    Raises:
        UntrustedError: A name is neither a package nor an address, for instance `*`.

    Examples:
        >>> with raywgen.trusting("mynets"):
        ...     generator = raywgen.load("runs/mine")
    """
    for name in names:
        if not (_PACKAGE.fullmatch(name) or _ADDRESS.fullmatch(name)):
            raise UntrustedError(f"trust={name}: name one package, such as mynets, or one address, such as hf:NAME")
    token = _TRUSTED.set(_TRUSTED.get() | set(names))
    try:
        yield
    finally:
        _TRUSTED.reset(token)


def trusted() -> tuple[str, ...]:
    """Returns the names that are trusted here, to be handed to `trusting` in another process."""
    return tuple(sorted(_TRUSTED.get()))


@contextmanager
def reading(source: str, folder: str = "") -> Iterator[None]:
    """Records the source of data while it is read.

    Args:
        source: Path or URI, for messages; an empty one changes nothing.
        folder: Files outside of this folder are not opened; empty keeps the folder of an enclosing `reading`.
    """
    token = _SOURCE.set(_Source(source, folder or _source().folder)) if source else None
    try:
        yield
    finally:
        if token is not None:
            _SOURCE.reset(token)


def entry_point(function: Callable[P, R]) -> Callable[P, R]:
    """Trusts the packages and addresses that the function's arguments name while the function runs.

    Use it only for functions that people call with configs that they wrote themselves.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with trusting(*named_in([*args, *kwargs.values()])):
            return function(*args, **kwargs)

    return run


def named_in(value: object) -> set[str]:
    """Returns the modules and addresses that a config names."""
    if isinstance(value, str):
        return _named(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return named_in([getattr(value, field.name) for field in dataclasses.fields(value)])
    if isinstance(value, Mapping):
        return named_in([part for key, part in value.items() if key not in _WORDS])
    return set().union(*map(named_in, value)) if isinstance(value, list | tuple) else set()


def _named(text: str) -> set[str]:
    if is_address(text):
        # `PATH::DOMAIN` stands for a domain of other data.
        return {part for part in (text, text.rpartition("::")[0]) if _ADDRESS.fullmatch(part)}
    found = _IMPORT_PATH.fullmatch(text)
    return {found[1]} if found and _PACKAGE.fullmatch(found[1]) else set()


def is_address(text: str) -> bool:
    """Whether opening this text as a path may contact another machine or fetch a model by its name."""
    return text.startswith((HUB, "//", "\\\\")) or ("://" in text and not text.startswith("file:///"))


@contextmanager
def beside(folder: str) -> Iterator[None]:
    """Lets `import_class` also look in this folder, within the block, for packages that are not installed.

    The folder joins the import path only once a module that the user named is found in it: libraries try to import many
    optional packages, and a downloaded working folder could hold files of these names.
    """
    token = _BESIDE.set(folder)
    try:
        yield
    finally:
        _BESIDE.reset(token)


def import_class(path: str, base: type[T], what: str) -> type[T]:
    """Imports the class that `package.module:Class` names. Nothing else imports by a name from data.

    Args:
        path: `package.module:Class`.
        base: The class must be a subclass of this.
        what: The kind of class, such as `encoder`, for messages.

    Raises:
        UntrustedError: The user did not name the package; nothing was imported.
        ImportError: There is no such module or attribute.
        TypeError: The attribute is no subclass of `base`; nothing was called.
    """
    module_name, _, attribute = path.partition(":")
    if not any(module_name == name or module_name.startswith(f"{name}.") for name in _TRUSTED.get()):
        package = module_name.partition(".")[0]
        raise UntrustedError(
            f"{what} '{path}'{_of_source()} would import '{module_name}', and recipes that come as data import nothing "
            f"unless you say so: {_allowed_by(package)}"
        )
    _add_folder_of(module_name.partition(".")[0])
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except AttributeError as error:
        raise ImportError(str(error)) from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise TypeError(f"it is no subclass of {base.__module__.removesuffix('.modules.module')}.{base.__name__}")
    return found


def _add_folder_of(package: str) -> None:
    """Puts the folder of `beside` last on the import path if the package lies there and nowhere before."""
    folder, find = _BESIDE.get(), importlib.machinery.PathFinder.find_spec
    is_missing = package not in sys.modules and find(package) is None
    if folder and is_missing and find(package, [folder]) is not None:
        sys.path.append(folder)


def check_address(address: str, what: str) -> None:
    """Refuses an address that the user did not name, and a file outside of the folder that is being read.

    Raises:
        UntrustedError: The address is not allowed; nothing was contacted.
    """
    if any(_lies_below(address, name) for name in _TRUSTED.get()):
        return
    if is_address(address):
        raise UntrustedError(
            f"{what} '{address}'{_of_source()} would be fetched from there, and data names no address to contact "
            f"unless you say so: {_allowed_by(address)}"
        )
    folder, path = _source().folder, Path(os.path.abspath(address.removeprefix("file://")))
    if folder and not path.is_relative_to(os.path.abspath(folder)):
        raise UntrustedError(
            f"{what} '{address}'{_of_source()} lies outside of that folder, and is opened only if you say so: "
            f"{_allowed_by(str(path))}"
        )


def check_recipe(recipe: Mapping[str, object], what: str) -> None:
    """Refuses a recipe with an address that the user did not name, at any depth.

    Raises:
        UntrustedError: The recipe has such an address; nothing was contacted.
    """
    for text in _texts(recipe):
        if is_address(text):
            check_address(text, what)


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            if key not in _WORDS:
                yield from _texts(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part)


def _lies_below(address: str, name: str) -> bool:
    """Whether a trusted name covers an address; not if the rest has a query or `..`, which may lead elsewhere."""
    if address == name:
        return True
    below = address.removeprefix(f"{name.rstrip('/')}/")
    return below != address and not re.search(r"[?#\\@]|(^|/)\.\.(/|$)", below)


def _of_source() -> str:
    source = _source().name
    return f" of {source}" if source else ""


def _source() -> _Source:
    return _SOURCE.get() or _Source()


def _allowed_by(name: str) -> str:
    return f"if you know it, add --trust {name} (in Python `with raywgen.trusting({name!r})`, or trust=({name!r},))"
