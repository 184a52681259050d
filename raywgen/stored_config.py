"""Configs that were stored with what they describe: their values are taken literally, as they came as data."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from raywgen.config import ConfigError, check_keys, open_groups, read_yaml
from raywgen.names import one_of
from raywgen.trust import UntrustedError

ConfigT = TypeVar("ConfigT")


def stored_config(schema: type[ConfigT], content: Mapping[str, object], source: str) -> ConfigT:
    """Makes a config of stored data. Values are taken literally: `${...}`, `???` and `=` have no meaning in it.

    Args:
        schema: A dataclass type; keys left out take the defaults of the fields that hold them.
        content: A nested mapping, as JSON or YAML holds it.
        source: Name for messages.

    Raises:
        ConfigError: A key is unknown, a value has the wrong type or is refused by the schema.
        UntrustedError: The content names a package to import that the user did not name.
    """
    return _stored(schema, content, source, None)


def _stored(schema: type[ConfigT], content: Mapping[str, object], source: str, base: ConfigT | None) -> ConfigT:
    """Does the work of `stored_config`; keys left out take the values of `base`, if there is one."""
    if not isinstance(content, Mapping):
        raise ConfigError(f"{source}: holds no group of keys")
    check_keys(schema, dict(content), source)
    hints = typing.get_type_hints(schema)
    defaults = _values(schema) if base is None else _values(base)
    try:
        for key, choose in open_groups(schema).items():
            # Always, so that a name which came as data is refused before the schema looks it up.
            group = choose(defaults | dict(content))
            if content.get(key) is not None:
                hints[key] = group
        given = {key: _typed(hints[key], value, source, key, defaults.get(key)) for key, value in content.items()}
        return schema(**given) if base is None else dataclasses.replace(typing.cast(Any, base), **given)
    except (ConfigError, UntrustedError):
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source}: {error}") from error


def read_stored_config(schema: type[ConfigT], path: str | Path) -> ConfigT:
    """Reads a stored config from a YAML file, such as the one in a run folder.

    Raises:
        ConfigError: The file cannot be read, or `stored_config` refuses its content.
    """
    return stored_config(schema, read_yaml(path), str(path))


def _values(config: Any) -> dict[str, object]:
    """Returns the values of a config's fields; for a config class those of the fields that have a default."""
    if not isinstance(config, type):
        return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    values = {}
    for field in dataclasses.fields(config):
        if field.default_factory is not dataclasses.MISSING:
            values[field.name] = field.default_factory()
        elif field.default is not dataclasses.MISSING:
            values[field.name] = field.default
    return values


def _typed(hint: Any, value: object, source: str, key: str, default: Any = None) -> Any:
    """Returns a value if it has the type of its field. Lists become tuples where the field takes tuples.

    Keys that a group leaves out take the values of the field's default, if that is a group of the same type.
    """
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        base = default if type(default) is hint else None
        return _stored(typing.cast(type, hint), value, f"{source}: {key}", base)
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in parts:
            return None
        *others, last = (part for part in parts if part is not type(None))
        for part in others:
            with suppress(ConfigError):
                return _typed(part, value, source, key, default)
        return _typed(last, value, source, key, default)
    if origin is typing.Literal:
        if any(type(value) is type(part) and value == part for part in parts):
            return value
        raise ConfigError(f"{source}: {one_of(key, value, parts)}")
    if origin in (list, tuple) and isinstance(value, list | tuple):
        return origin(_typed(parts[0], entry, source, key) for entry in value)
    if origin is dict and isinstance(value, Mapping):
        return {name: _typed(parts[1], entry, source, key) for name, entry in value.items()}
    if hint is float and type(value) in (int, float):
        return float(typing.cast(float, value))
    if type(value) is hint:
        return value
    raise ConfigError(f"{source}: {key} holds a {type(value).__name__}, where it takes {hint}")
