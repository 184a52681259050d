"""Names of methods: those that come with the package, and classes of the user's own."""

from __future__ import annotations

from raywgen.trust import is_address, named_in

METHOD_NAMES = ("igpg", "mcdi", "lohp", "units", "direct", "hypernetwork")
"""The shipped methods; their classes are in `raywgen.generators.registry`, which imports torch."""


def is_import_path(name: str) -> bool:
    """Whether a method's name is that of a class of the user's own, such as `mypackage.flow:FlowMatching`."""
    return bool(named_in(name)) and not is_address(name)
