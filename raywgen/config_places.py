"""Settings that say where something lies, and so change neither what a run learns nor what a generator is."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

ConfigT = TypeVar("ConfigT")
PLACE = "place"
"""Key in the `metadata` of a field of a config whose value is such a setting."""


def without_places(config: ConfigT) -> ConfigT:
    """Returns a config, a dataclass, with the default in place of each such setting, at any depth."""
    assert dataclasses.is_dataclass(config)
    assert not isinstance(config, type)
    changes: dict[str, object] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.metadata.get(PLACE):
            changes[field.name] = field.default
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            plain = without_places(value)
            if plain is not value:
                changes[field.name] = plain
    return dataclasses.replace(config, **changes) if changes else config
