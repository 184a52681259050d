"""The method of the run that a folder holds, which can be told without torch."""

from __future__ import annotations

from pathlib import Path

from raywgen.config import ConfigError, read_yaml
from raywgen.generators.method_names import METHOD_NAMES, is_import_path


def read_method(path: str | Path) -> str:
    """Returns the method that the config of a run names; a class of the user's own is not imported for it.

    Raises:
        ConfigError: The file is missing, or names no method; the message names the remedy.
    """
    try:
        name = read_yaml(path).get("method")
    except ConfigError:
        name = None  # What is wrong with the file is said below, with the remedy.
    if isinstance(name, str) and (name in METHOD_NAMES or is_import_path(name)):
        return name
    from raywgen.training.config import read_train_config

    return read_train_config(path).method
