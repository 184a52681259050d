"""Networks by registry name or import path."""

from __future__ import annotations

import difflib
import importlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from raywgen.tasks.base import TaskError


def mlp(widths: Sequence[int]) -> nn.Module:
    """A ReLU perceptron; `widths` runs from the features of a sample to the classes.

    Raises:
        TaskError: Fewer than two widths, or one below 1.
    """
    if len(widths) < 2 or min(widths) < 1:
        raise TaskError(f"widths={list(widths)}: give at least two positive widths, for instance [64, 14, 2]")
    modules: list[nn.Module] = []
    for width_in, width_out in itertools.pairwise(widths):
        modules += [nn.Linear(width_in, width_out), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


NETWORKS: dict[str, Callable[..., nn.Module]] = {"mlp": mlp}


def build_network(recipe: Mapping[str, Any]) -> nn.Module:
    """Builds `{"name": NAME, **arguments}`; NAME is of the registry, or `package.module:Class`.

    Raises:
        TaskError: The name is unknown (the nearest is named), cannot be imported, or refuses its arguments.
    """
    arguments = {key: value for key, value in recipe.items() if key != "name"}
    name = str(recipe.get("name", ""))
    build = _import(name) if ":" in name else NETWORKS.get(name)
    if build is None:
        near = difflib.get_close_matches(name, NETWORKS, n=1, cutoff=0.0)[0]
        raise TaskError(f"unknown network '{name}'; did you mean '{near}'? (or give package.module:Class)")
    try:
        module = build(**arguments)
    except TypeError as error:
        raise TaskError(f"network '{name}' does not take {arguments}: {error}") from error
    if not isinstance(module, nn.Module):
        raise TaskError(f"network '{name}' gives a {type(module).__name__}, not an nn.Module")
    return module


def network_name(recipe: Mapping[str, Any]) -> str:
    """A short name that says the architecture, for instance `mlp-64-14-2`."""
    parts = [str(recipe["name"]).rpartition(":")[2]]
    for key, value in recipe.items():
        if key != "name":
            parts += map(str, value) if isinstance(value, list | tuple) else [str(value)]
    return "-".join(parts)


def _import(path: str) -> Callable[..., nn.Module]:
    module_name, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise TaskError(f"cannot import network '{path}': {error}") from error
