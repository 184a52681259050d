"""Names of a package that are imported from its modules when they are first asked for.

`import raywgen` and `raywgen status` would otherwise wait for torch, which takes longer than all that they do.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence


def lazy_names(
    package: str, names: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Returns the functions `__getattr__` and `__dir__` of a package.

    A package names the same imports once more below `if TYPE_CHECKING:`, for type checkers and editors. No module may
    have the name of something that its package exports, as Python would then put the module in its place.

    Args:
        package: Full name of the package.
        names: Full name of each module, and the names that the package takes from it.
    """
    places = {name: module for module, group in names.items() for name in group}

    def getattribute(name: str) -> object:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(places[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    def names_of() -> list[str]:
        return sorted({*vars(sys.modules[package]), *places})

    return getattribute, names_of
