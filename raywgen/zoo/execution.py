"""Chooses how networks are trained here: at once as a stack, or one after another.

Shape legend: N networks of a stack.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import median

import torch

from raywgen.tasks import FitConfig, FitData, Recorded, build_network, build_task, fit, network_name, repeat_state
from raywgen.zoo.config import ZooConfig
from raywgen.zoo.draw import draw_tasks, placed_networks
from raywgen.zoo.plan import initial_state

_MOST_NETWORKS = 16
_STEPS = 4
_PAIRS = 5


@dataclass(frozen=True, slots=True)
class Timed:
    """CPU milliseconds per network and step of both ways, in the order in which the pairs were run.

    Attributes:
        stack: All networks at once.
        alone: One network after another.
    """

    stack: tuple[float, ...]
    alone: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Median over the pairs of what `alone` takes over what `stack` takes."""
        return median(alone / stack for stack, alone in zip(self.stack, self.alone, strict=True))

    @property
    def way(self) -> str:
        """The one that takes less."""
        return "stack" if self.ratio > 1 else "alone"


def choose_ways(config: ZooConfig, on_choice: Callable[[str], None] | None = None) -> dict[str, str]:
    """Network name -> `stack` or `alone`, whichever takes less CPU time for a few steps of a few networks.

    CPU time and not wall time, for on a busy machine wall time says who was interrupted; and pairs in alternating
    order, so that a change of the processor's speed meets both.

    Args:
        config: The recipe.
        on_choice: Receives a sentence for each network.
    """
    recipes = [recipe for drawn in draw_tasks(config).values() for recipe in drawn]
    task = build_task(recipes[0])
    data = FitData.joined([task.train_inputs], task.train_y_S, config.tasks.channels or 1)
    one = replace(config.fits()[0], num_steps=_STEPS)
    num = max(1, min(_MOST_NETWORKS, config.stack_size, len(recipes) * config.seeds_per_task))
    ways: dict[str, str] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for recipe in placed_networks(config):
            timed = _timed(recipe, data, one, num)
            name = network_name(recipe)
            ways[name] = timed.way
            if on_choice is not None:
                on_choice(
                    f"{name}: {timed.way} (CPU time a network and step: stack {median(timed.stack):.2f} ms, "
                    f"alone {median(timed.alone):.2f} ms)"
                )
    finally:
        torch.set_num_threads(threads)
    return ways


def _timed(recipe: Mapping[str, object], data: FitData, config: FitConfig, num: int) -> Timed:
    """Both ways over alternating pairs, after one pair that warms up."""
    start = Recorded(step=0, state_N=repeat_state(initial_state(dict(recipe), 0), num))
    module = build_network(recipe)
    milliseconds: dict[str, list[float]] = {"stack": [], "alone": []}
    for pair in range(_PAIRS + 1):
        for way in ("stack", "alone") if pair % 2 else ("alone", "stack"):
            begin = time.thread_time()
            fit(module, start, data, config, order_seeds=range(num), record_steps=[], way=way)
            if pair > 0:
                milliseconds[way].append(1e3 * (time.thread_time() - begin) / num / _STEPS)
    return Timed(stack=tuple(milliseconds["stack"]), alone=tuple(milliseconds["alone"]))
