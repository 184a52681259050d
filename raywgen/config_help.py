"""Lists the keys of a config with their defaults, and the help that its docstring gives for each."""

from __future__ import annotations

import dataclasses
import inspect
import re


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """One key of a config: its dotted name, its default, and its help text from the docstring."""

    key: str
    default: str
    help: str


def describe(schema: type, prefix: str = "", group: object = None) -> list[Setting]:
    """Returns all keys of a config class, nested ones under dotted names, with their help texts.

    Args:
        schema: The config class.
        prefix: The dotted name of a nested config, with a dot at its end.
        group: The defaults of a nested config, which need not be those of its class.
    """
    texts = _attribute_texts(schema)
    settings = []
    for field in dataclasses.fields(schema):
        missing = field.default_factory is dataclasses.MISSING
        if group is not None:
            default = getattr(group, field.name)
        else:
            default = field.default if missing else field.default_factory()  # pyright: ignore[reportCallIssue]
        if dataclasses.is_dataclass(default):
            settings += describe(type(default), f"{prefix}{field.name}.", default)
        else:
            settings.append(Setting(f"{prefix}{field.name}", str(default), texts.get(field.name, "")))
    return settings


def _attribute_texts(schema: type) -> dict[str, str]:
    """Parses the `Attributes:` sections of a class and its base classes."""
    texts: dict[str, str] = {}
    for cls in reversed(schema.__mro__):
        section = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")[2]
        name = ""
        for line in section.splitlines():
            if match := re.match(r" {4}(\w+): (.*)", line):
                name, texts[match[1]] = match[1], match[2]
            elif line.startswith(" " * 8) and name:
                texts[name] += " " + line.strip()
            else:
                break
    return texts
