"""Chooses how networks are trained on this machine: at once as a stack, or one after another.

Shape letters beyond the legend in `raywgen.weights`: N networks of a stack.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import median

import torch

from raywgen.tasks import FitConfig, FitData, Recorded, build_network, build_task, fit, network_name, repeat_state
from raywgen.tasks.train_loop import EXECUTIONS, Execution
from raywgen.zoo.config import ZooConfig
from raywgen.zoo.draw import draw_tasks, network_recipes
from raywgen.zoo.plan import initial_state

_MOST_NETWORKS = 16
_STEPS = 4
_PAIRS = 5


@dataclass(frozen=True, slots=True)
class ExecutionTimes:
    """CPU milliseconds per network and step of both executions; entry i of both was measured in the i-th pair.

    Attributes:
        stacked: All networks at once.
        sequential: One network after another.
    """

    stacked: tuple[float, ...]
    sequential: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """The median over the pairs of sequential time by stacked time."""
        return median(one / other for one, other in zip(self.sequential, self.stacked, strict=True))

    @property
    def faster(self) -> Execution:
        """The execution that takes less time."""
        return "stacked" if self.ratio > 1 else "sequential"


def choose_executions(config: ZooConfig, on_choice: Callable[[str], None] | None = None) -> dict[str, Execution]:
    """Measures for each network whether `stacked` or `sequential` takes less CPU time for a few steps of a few copies.

    CPU time is compared, because wall time depends on other processes of the machine. The order within a pair
    alternates, so that a change of the processor's speed affects both executions.

    Args:
        config: The recipe.
        on_choice: Receives a sentence for each network.

    Returns:
        The execution of each network by its name.
    """
    recipes = [recipe for of_split in draw_tasks(config).values() for recipe in of_split]
    task = build_task(recipes[0])
    data = FitData.joined([task.train_inputs], task.train_y_S)
    one = replace(config.fits()[0], num_steps=_STEPS)
    num = max(1, min(_MOST_NETWORKS, config.stack_size, len(recipes) * config.seeds_per_task))
    executions: dict[str, Execution] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for recipe in network_recipes(config):
            times = _measure(recipe, data, one, num)
            name = network_name(recipe)
            executions[name] = times.faster
            if on_choice is not None:
                on_choice(
                    f"{name}: {times.faster} (CPU time a network and step: stacked {median(times.stacked):.2f} ms, "
                    f"sequential {median(times.sequential):.2f} ms)"
                )
    finally:
        torch.set_num_threads(threads)
    return executions


def _measure(recipe: Mapping[str, object], data: FitData, config: FitConfig, num: int) -> ExecutionTimes:
    """Times both executions in pairs of alternating order, after one warm-up pair."""
    start = Recorded(step=0, state_N=repeat_state(initial_state(dict(recipe), 0), num))
    module = build_network(recipe)
    milliseconds: dict[Execution, list[float]] = {name: [] for name in EXECUTIONS}
    for pair in range(_PAIRS + 1):
        for execution in EXECUTIONS if pair % 2 else reversed(EXECUTIONS):
            begin = time.thread_time()
            fit(module, start, data, config, order_seeds=range(num), record_steps=[], execution=execution)
            if pair > 0:
                milliseconds[execution].append(1e3 * (time.thread_time() - begin) / num / _STEPS)
    return ExecutionTimes(**{name: tuple(times) for name, times in milliseconds.items()})
