"""The one place where methods have names: shipped ones a short name, a user's own `package.module:Class`."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from raywgen.generators.direct import Direct
from raywgen.generators.hypernetwork import Hypernetwork
from raywgen.generators.igpg import IGPG
from raywgen.generators.interface import DataSpec, Generator
from raywgen.generators.lohp import LoHp
from raywgen.generators.mcdi import McDi
from raywgen.generators.method_names import METHOD_NAMES, is_import_path
from raywgen.generators.settings import GeneratorConfig
from raywgen.generators.units import Units
from raywgen.names import nearest
from raywgen.trust import import_class
from raywgen.weights import NormalizerTable

METHODS: dict[str, type[Generator]] = dict(
    zip(METHOD_NAMES, (IGPG, McDi, LoHp, Units, Direct, Hypernetwork), strict=True)
)
_FORM = "package.module:Class"


class UnknownMethodError(KeyError):
    """A method that does not exist, or a class that cannot serve as one; the message says the remedy."""

    def __str__(self) -> str:
        return str(self.args[0])


class MethodImportError(UnknownMethodError):
    """A class of the user's own that cannot be imported here, or that is no generator which can be built."""


def method(name: str) -> type[Generator]:
    """Returns the class of a method; it is built by `cls(config, normalizers, data)`, with a config of `cls.Config`.

    Args:
        name: A key of `METHODS`, or `package.module:Class`, a `Generator` of the user's own package.

    Raises:
        UnknownMethodError: There is no such method; the nearest is named.
        MethodImportError: The class cannot be imported, or is no generator that can be built.
        UntrustedError: It names a package that the user did not; see `raywgen.trust`.
    """
    if ":" in name:
        return _own(name)
    if name not in METHODS:
        near = nearest(name, METHODS)
        raise UnknownMethodError(
            f"unknown method '{name}'; did you mean '{near}'? (known: {', '.join(METHODS)}; one of your own is {_FORM})"
        )
    return METHODS[name]


def build(name: str, config: GeneratorConfig, normalizers: NormalizerTable, data: DataSpec) -> Generator:
    """Builds a method's generator, which keeps the name that it was built by."""
    generator = method(name)(config, normalizers, data)
    generator.method = name
    return generator


def _own(path: str) -> type[Generator]:
    if not is_import_path(path):
        raise MethodImportError(f"method '{path}' names no class; {_remedy(path)}")
    try:
        found = import_class(path, Generator, "method")
    except (ImportError, SyntaxError) as error:
        raise MethodImportError(f"cannot import method '{path}': {error}; {_remedy(path)}") from error
    except TypeError as error:
        raise MethodImportError(f"method '{path}' cannot be used: {error}; {_remedy(path)}") from error
    if missing := sorted(getattr(found, "__abstractmethods__", ())):
        raise MethodImportError(f"method '{path}' cannot be used: the class does not define {', '.join(missing)}")
    config = getattr(found, "Config", None)
    if not (inspect.isclass(config) and issubclass(config, GeneratorConfig) and "__dataclass_fields__" in vars(config)):
        raise MethodImportError(
            f"method '{path}' cannot be used: the class has no usable `Config`; give it a dataclass of its settings "
            "that inherits raywgen.generators.GeneratorConfig, in which each stage's name is the key of a StageConfig"
        )
    return found


def _remedy(path: str) -> str:
    """Names the generators of the module, or says where modules are looked for."""
    module_name, _, attribute = path.partition(":")
    module = sys.modules.get(module_name)
    known = [name for name, value in vars(module).items() if _is_generator(value)] if module is not None else []
    if known:
        return f"did you mean '{module_name}:{nearest(attribute, known)}'?"
    if module is not None:
        return f"{module.__name__} holds no subclass of raywgen.generators.Generator"
    return f"write it as {_FORM}, and install the package, or give the command in the folder that the package lies in"


def _is_generator(value: Any) -> bool:
    return inspect.isclass(value) and issubclass(value, Generator) and not inspect.isabstract(value)
