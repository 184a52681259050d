"""Generates networks in a process of its own and measures it, and what follows from times and sizes."""

from __future__ import annotations

import math
import multiprocessing
import os
import threading
import time
from contextlib import nullcontext
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch

from raywgen.benchmarks.memory_peak import memory_peak
from raywgen.generation import GenerateConfig, generate
from raywgen.training.session import ray_session


class Measured(NamedTuple):
    """The measurements of a process that generated some networks.

    Attributes:
        seconds: Seconds of each network from the first window on.
        cpu_seconds: CPU seconds of the process, likewise.
        paths: The file of each network.
        peak: Most anonymous memory of the process, bytes.
        gpu_peak: Most memory of tensors on its GPU, bytes.
    """

    seconds: list[float]
    cpu_seconds: list[float]
    paths: list[str]
    peak: int
    gpu_peak: int


def in_own_process(configs: list[GenerateConfig]) -> Measured:
    """Generates networks, one after another, in a fresh process.

    Raises:
        RuntimeError: The process failed; it has said why.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, configs))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError("the process that generates failed; what it wrote says why") from None
    finally:
        process.join()


def _end_with_parent() -> None:
    """Ends this process with its parent, which may be killed while a network is generated."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _child(sender: Connection, configs: list[GenerateConfig]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    seconds, cpu_seconds, paths = [], [], []
    over_ray = any(config.where == "ray" for config in configs)
    with ray_session() if over_ray else nullcontext(), memory_peak() as peak:
        for config in configs:
            starts: list[tuple[float, float]] = []

            def on_progress(done: int, total: int, starts: list[tuple[float, float]] = starts) -> None:
                starts.append((time.perf_counter(), time.process_time()))

            rows = generate(config, on_progress, on_progress)
            seconds.append(time.perf_counter() - starts[0][0])
            cpu_seconds.append(time.process_time() - starts[0][1])
            paths += [row.path for row in rows]
        gpu_peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        sender.send(Measured(seconds, cpu_seconds, paths, peak(), gpu_peak))


def slope(sizes: list[int], seconds: list[float]) -> float:
    """Returns the slope of the least-squares line through log size and log time."""
    logs = [(math.log(size), math.log(taken)) for size, taken in zip(sizes, seconds, strict=True)]
    mean_x, mean_y = (sum(column) / len(logs) for column in zip(*logs, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)


def steady_rate(reports: list[tuple[float, int]], num_actors: int) -> float:
    """Returns values a second after each actor has done one piece, as the first ones start and compile.

    Args:
        reports: Time, and values done, at the start and after each piece.
        num_actors: Number of actors.

    Raises:
        ValueError: There are too few pieces.
    """
    if len(reports) < num_actors + 2:
        raise ValueError(
            f"{len(reports) - 1} pieces are too few to compare actors by; give larger sizes, a smaller "
            "generator.prior.window, or compare_actors=false"
        )
    (begin, first), (end, last) = reports[num_actors], reports[-1]
    return (last - first) / (end - begin)
