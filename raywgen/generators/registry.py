"""The one place where methods have names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from raywgen.generators.direct import Direct, DirectConfig
from raywgen.generators.hypernetwork import Hypernetwork, HypernetworkConfig
from raywgen.generators.igpg import IGPG, IGPGConfig
from raywgen.generators.interface import GeneratorFactory
from raywgen.generators.lohp import LoHp, LoHpConfig
from raywgen.generators.mcdi import McDi, McDiConfig
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


METHODS: dict[str, Method] = {
    "igpg": Method(IGPGConfig, IGPG),
    "mcdi": Method(McDiConfig, McDi),
    "lohp": Method(LoHpConfig, LoHp),
    "direct": Method(DirectConfig, Direct),
    "hypernetwork": Method(HypernetworkConfig, Hypernetwork),
}


def method(name: str) -> Method:
    """The method of that name.

    Raises:
        UnknownMethodError: There is none; the nearest is named.
    """
    if name not in METHODS:
        near = nearest(name, METHODS)
        raise UnknownMethodError(f"unknown method '{name}'; did you mean '{near}'? (known: {', '.join(METHODS)})")
    return METHODS[name]
