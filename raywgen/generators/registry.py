"""The one place where methods have names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from raywgen.generators.direct import Direct
from raywgen.generators.hypernetwork import Hypernetwork
from raywgen.generators.igpg import IGPG
from raywgen.generators.interface import GeneratorFactory
from raywgen.generators.lohp import LoHp
from raywgen.generators.mcdi import McDi
from raywgen.names import nearest


class UnknownMethodError(KeyError):
    """A method name that the registry does not hold."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True, slots=True)
class Method:
    """The settings class and the builder of one method."""

    config: type[Any]
    build: GeneratorFactory


METHODS = {shipped.method: Method(shipped.Config, shipped) for shipped in (IGPG, McDi, LoHp, Direct, Hypernetwork)}


def method(name: str) -> Method:
    """The method of that name.

    Raises:
        UnknownMethodError: There is none; the nearest is named.
    """
    if name not in METHODS:
        near = nearest(name, METHODS)
        raise UnknownMethodError(f"unknown method '{name}'; did you mean '{near}'? (known: {', '.join(METHODS)})")
    return METHODS[name]
