"""Faults on a Ray cluster: workers, nodes, raylets and the driver end or hang while runs train there."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from raywgen.benchmarks.chaos_cluster import LocalCluster, TrainCommand, local_cluster
from raywgen.benchmarks.chaos_runs import Losses, LostError, Outcome, RunView, loss_difference, losses_of, wait_for
from raywgen.training import TrainConfig
from raywgen.training.notices import NOTICE
from raywgen.training.workers_log import read_workers

_PATIENCE = 300.0
_NOTICE_SECONDS = 60
_STEPS_BETWEEN = (3, 14)
_PULSES, _PULSE_SECONDS, _PAUSE_SECONDS = 20, 0.2, 0.05


@dataclass(frozen=True, slots=True)
class ClusterFault:
    """A fault, and what must follow.

    Attributes:
        name: Its name.
        cause: Causes it.
        restarts: Whether the workers are started again after it.
        workers: Number of workers after it; 0 for as many as before.
        slows: Whether the workers are slowed down until they are started again: Ray looks for new nodes every few
            seconds, in which a fast machine might train the run to its end.
    """

    name: str
    cause: Callable[[LocalCluster, TrainCommand], None]
    restarts: bool = True
    workers: int = 0
    slows: bool = False


def _kill_last(cluster: LocalCluster, command: TrainCommand) -> None:
    os.kill(command.pids()[-1], signal.SIGKILL)


def _kill_first(cluster: LocalCluster, command: TrainCommand) -> None:
    os.kill(command.pids()[0], signal.SIGKILL)


def _remove_node(cluster: LocalCluster, command: TrainCommand) -> None:
    cluster.remove_node_of(command.pids()[-1])


def _remove_node_after_checkpoint(cluster: LocalCluster, command: TrainCommand) -> None:
    before = command.view.saved()
    wait_for(lambda: command.view.saved() > before, _PATIENCE, "the next checkpoint")
    cluster.remove_node_of(command.pids()[-1])


def _kill_raylet(cluster: LocalCluster, command: TrainCommand) -> None:
    cluster.kill_raylet_of(command.pids()[-1])


def _announce_and_remove_node(cluster: LocalCluster, command: TrainCommand) -> None:
    """Takes a node away once the notice of it has made a checkpoint."""
    pid, began = command.pids()[-1], time.time()
    cluster.announce_end_of_node_of(pid, _NOTICE_SECONDS)
    wait_for(
        lambda: _is_warned(command.view, began), _NOTICE_SECONDS, "the notice of a node's end in the run's history"
    )
    before = command.view.saved()
    wait_for(lambda: command.view.saved() > before, _NOTICE_SECONDS, "the checkpoint that follows a notice")
    cluster.remove_node_of(pid)


def _is_warned(view: RunView, since: float) -> bool:
    return any(NOTICE in event.reason and event.time >= since for event in read_workers(view.out))


def _hang(cluster: LocalCluster, command: TrainCommand) -> None:
    os.kill(command.pids()[-1], signal.SIGSTOP)


def _slow_down(cluster: LocalCluster, command: TrainCommand) -> None:
    for _ in range(_PULSES):
        _stop_for_a_moment(command.pids()[-1])


def _stop_for_a_moment(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
        time.sleep(_PULSE_SECONDS)
        os.kill(pid, signal.SIGCONT)
        time.sleep(_PAUSE_SECONDS)


def _kill_driver(cluster: LocalCluster, command: TrainCommand) -> None:
    command.kill()
    command.start()


def _shrink(cluster: LocalCluster, command: TrainCommand) -> None:
    for pid in command.pids()[1:]:
        cluster.remove_node_of(pid)


def _grow(cluster: LocalCluster, command: TrainCommand) -> None:
    while cluster.num_nodes < NUM_NODES:
        cluster.add_node()


NUM_NODES = 3
FAULTS = (
    ClusterFault("worker killed", _kill_last),
    ClusterFault("first worker killed", _kill_first),
    ClusterFault("node removed", _remove_node),
    ClusterFault("node removed after a checkpoint", _remove_node_after_checkpoint),
    ClusterFault("node's end announced, node removed", _announce_and_remove_node),
    ClusterFault("raylet killed", _kill_raylet),
    ClusterFault("rank hangs", _hang),
    ClusterFault("rank is slow", _slow_down, restarts=False),
    ClusterFault("driver killed, command given again", _kill_driver),
)
ELASTIC_FAULTS = (
    ClusterFault("scale 3 to 1", _shrink, workers=1),
    ClusterFault("scale 1 to 3", _grow, workers=3, slows=True),
)
KILL = FAULTS[0]


def break_on_cluster(
    configs: list[TrainConfig], faults: list[list[ClusterFault]], wanted: Mapping[str, Losses], seed: int
) -> list[Outcome]:
    """Trains runs by one command on a cluster of three nodes, and causes faults in each.

    Args:
        configs: The runs, in order.
        faults: The faults of each.
        wanted: Losses of the undisturbed run, by run folder.
        seed: Decides the steps at which faults come.
    """
    rng = random.Random(seed)
    outcomes: list[Outcome] = []
    with local_cluster(NUM_NODES) as cluster:
        command = TrainCommand(configs, cluster.address)
        command.start()
        try:
            for config, each in zip(configs, faults, strict=True):
                command.view = RunView(Path(config.out))
                found = [_suffer(fault, cluster, command, rng) for fault in each]
                is_over = command.is_over if config is configs[-1] else command.is_done
                wait_for(is_over, _PATIENCE, f"the end of {config.out}")
                difference = loss_difference(losses_of(Path(config.out)), wanted[config.out])
                outcomes += [outcome.with_losses(difference) for outcome in found]
        except LostError as error:
            names = [fault.name for each in faults for fault in each][len(outcomes) :]
            print(f"{error}; the command says:\n{command.output()[-4000:]}", flush=True)
            outcomes += [Outcome(name) for name in names]
        finally:
            command.kill()
    return outcomes


def _suffer(fault: ClusterFault, cluster: LocalCluster, command: TrainCommand, rng: random.Random) -> Outcome:
    """Causes a fault some steps after the workers were started last, and waits until training has gone on."""
    view = command.view
    _wait(command, lambda: bool(view.starts()), f"the start of {view.out}")
    earliest = _position(view) + rng.randint(*_STEPS_BETWEEN)
    _wait(command, lambda: view.taken() >= earliest, f"step {earliest}")
    num_starts, began = len(view.starts()), time.monotonic()
    fault.cause(cluster, command)
    taken = view.taken()

    def is_started() -> bool:
        nonlocal taken
        if len(view.starts()) > num_starts:
            return True
        taken = max(taken, view.taken())
        if fault.slows:
            _stop_for_a_moment(command.pids()[0])
        return False

    if fault.restarts:
        _wait(command, is_started, f"{fault.name}: a new start")
        start = view.starts()[-1]
        if fault.workers and start.workers != fault.workers:
            raise LostError(f"{fault.name}: {start.workers} workers instead of {fault.workers}")
    position = _position(view) if fault.restarts else taken
    _wait(command, lambda: _logged(view) > position, f"{fault.name}: a step")
    seconds = time.monotonic() - began
    if not fault.workers:
        _grow(cluster, command)
    return Outcome(fault.name, lost_steps=max(0, taken - position), seconds=seconds)


def _position(view: RunView) -> int:
    start = view.starts()[-1]
    return view.total(start.stage, start.step)


def _logged(view: RunView) -> int:
    """Returns the steps taken by the metric log once it was written to after the newest start; 0 before."""
    is_newer = (Path(view.out) / "metrics.jsonl").stat().st_mtime > view.starts()[-1].time
    return view.taken() if is_newer else 0


def _wait(command: TrainCommand, is_there: Callable[[], bool], what: str) -> None:
    def came_or_over() -> bool:
        return is_there() or command.is_over()

    wait_for(came_or_over, _PATIENCE, what)
    if not is_there():
        raise LostError(f"{what}: the command has ended before")
