"""Chooses how networks are trained here: at once as a stack, or one after another."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from raywgen.tasks import FitData, Recorded, build_network, build_task, fit, network_name, repeat_state
from raywgen.zoo.config import ZooConfig
from raywgen.zoo.draw import draw_tasks, placed_networks
from raywgen.zoo.plan import initial_state

_NETWORKS = 8
_STEPS = 4


def choose_ways(config: ZooConfig, on_choice: Callable[[str], None] | None = None) -> dict[str, str]:
    """Network name -> `stack` or `alone`, whichever took less time for a few steps of a few networks.

    Args:
        config: The recipe.
        on_choice: Told in words.
    """
    recipes = [recipe for drawn in draw_tasks(config).values() for recipe in drawn]
    task = build_task(recipes[0])
    data = FitData.joined([task.train_inputs], task.train_y_S, config.tasks.channels or 1)
    one = replace(config.fits()[0], num_steps=_STEPS)
    ways: dict[str, str] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for recipe in placed_networks(config):
        start = Recorded(step=0, state_N=repeat_state(initial_state(recipe, 0), _NETWORKS))
        seconds = {}
        for way in ("stack", "alone"):
            # The first run warms up, the second counts.
            for _ in range(2):
                begin = time.perf_counter()
                fit(build_network(recipe), start, data, one, order_seeds=range(_NETWORKS), record_steps=[], way=way)
                seconds[way] = time.perf_counter() - begin
        name = network_name(recipe)
        ways[name] = min(seconds, key=lambda way: seconds[way])
        if on_choice is not None:
            per_step = {way: 1e3 * took / _NETWORKS / _STEPS for way, took in seconds.items()}
            told = ", ".join(f"{way} {ms:.2f} ms" for way, ms in per_step.items())
            on_choice(f"{name}: {ways[name]} ({told} a network and step)")
    torch.set_num_threads(threads)
    return ways
