"""Estimates the running statistics of generated networks anew.

Shape letters beyond the legend in `raywgen.weights`: N networks.
"""

from __future__ import annotations

import copy
import json
import shlex
from contextlib import suppress

import torch
from torch import Tensor, nn

from raywgen.corpus import NetworkFacts
from raywgen.generation.warn_caller import warn_caller
from raywgen.nn.batch_norm import NotFiniteError, reestimate_statistics
from raywgen.tasks import Task
from raywgen.weights import KeyedNoise, Layout

_STREAM = 4_000
_RUNNING = "running_var"


class StatisticsWarning(UserWarning):
    """A network was written with the statistics of batch normalisation that the generator wrote."""


def some_inputs(task: Task, num: int, seed: int = 0) -> Tensor:
    """Draws training inputs `(S, F)` of a task without replacement; all of them where there are no more."""
    noise = KeyedNoise(seed, torch.zeros(1, dtype=torch.int64), _STREAM)
    return task.train_inputs[noise.uniform(len(task.train_inputs))[0].argsort(stable=True)[:num]]


def with_new_statistics(module: nn.Module, layout: Layout, values_ND: Tensor, unlabelled_SF: Tensor) -> Tensor:
    """Replaces the running statistics of batch normalisation by those of activations on unlabelled samples.

    A generator that was trained with the statistics of batches generates running ones that mean nothing.

    Args:
        module: A module of the layout; its own values are not used.
        layout: Layout of the networks.
        values_ND: Flat vectors.
        unlabelled_SF: Inputs of the task, the more the better.

    Returns:
        The flat vectors `(N, D)` with new statistics; with their own where activations are not finite.
    """
    module = copy.deepcopy(module)
    rows = []
    for values_D in values_ND:
        state = layout.unflatten(values_D, counters=module.state_dict())
        module.load_state_dict(state)
        # A network that overflows is none of the best, whatever its statistics.
        with suppress(NotFiniteError):
            state |= reestimate_statistics(module, unlabelled_SF)
        rows.append(layout.flatten(state))
    return torch.stack(rows)


def warn_of_statistics(network: NetworkFacts, path: str) -> None:
    """Warns of generated statistics of a network that was not run, and says how to estimate them; else does nothing.

    Args:
        network: The network.
        path: The file of one such network.
    """
    num = sum(spec.name.rpartition(".")[2] == _RUNNING for spec in network.layout.generated)
    if not num:
        return
    recipe = shlex.quote(f"network={json.dumps(network.recipe)}") if network.recipe else "network=package.module:Class"
    warn_caller(
        f"{network.name}: the statistics of its {num} layers of batch normalisation are generated ones, which may not "
        f"fit the weights; `raywgen statistics {shlex.quote(path)} {recipe} data=IMAGES` estimates them from images",
        StatisticsWarning,
    )
