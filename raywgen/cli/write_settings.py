"""Writes the file of settings that `--help` reads: `python -m raywgen.cli.write_settings`."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import astuple

from raywgen.cli.known_settings import PATH, SCHEMAS
from raywgen.config_help import describe
from raywgen.files import write_text
from raywgen.generators.method_names import METHOD_NAMES

_PREFIXES = {"cluster render": "cluster."}


def collect() -> dict[str, Mapping[str, list[tuple[str, ...]]]]:
    """Returns what the file has to hold, from the classes themselves."""
    from raywgen.generators import METHODS

    commands = {}
    for path, place in SCHEMAS.items():
        module, _, name = place.partition(":")
        schema = getattr(importlib.import_module(module), name)
        commands[path] = [astuple(setting) for setting in describe(schema, _PREFIXES.get(path, ""))]
    methods = {
        name: [astuple(setting) for setting in describe(METHODS[name].Config, "generator.")] for name in METHOD_NAMES
    }
    return {"commands": commands, "methods": methods}


def main() -> None:
    """Writes the file, one setting a line."""
    parts = []
    for kind, groups in collect().items():
        rows = (
            f"  {json.dumps(name)}: [\n" + ",\n".join(f"   {json.dumps(row)}" for row in settings) + "\n  ]"
            for name, settings in groups.items()
        )
        parts.append(f" {json.dumps(kind)}: {{\n" + ",\n".join(rows) + "\n }")
    write_text(PATH, "{\n" + ",\n".join(parts) + "\n}\n")


if __name__ == "__main__":
    main()
