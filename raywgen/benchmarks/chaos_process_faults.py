"""Faults that need no cluster: kills at random moments, and checkpoints that are damaged or find no room."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from raywgen.benchmarks.chaos_processes import Group
from raywgen.benchmarks.chaos_runs import Losses, LostError, Outcome, RunView, loss_difference, losses_of, wait_for
from raywgen.training import TrainConfig
from raywgen.training.checkpoints import CHECKPOINTS

_PATIENCE = 120.0
# Room for all that a run writes but its checkpoints.
_SMALL_FILE = 16_384


def kill_at_random(
    config: TrainConfig, num_workers: int, num_kills: int, wanted: Losses, rng: random.Random
) -> list[Outcome]:
    """Kills a process of runs at random moments, again and again, and starts it again each time.

    Args:
        config: The run; each further run has a folder of its own beside it.
        num_workers: Processes over gloo; 0 for one alone.
        num_kills: Kills in all.
        wanted: Losses of the undisturbed run.
        rng: Decides the moments, and which process is killed.
    """
    name = f"killed at random, {num_workers or 1} process{'es' * (num_workers > 1)}"
    outcomes: list[Outcome] = []
    number, seconds = 0, 0.0
    while len(outcomes) < num_kills:
        run = replace(config, out=f"{config.out}-{number}")
        view, found, number = RunView(Path(run.out)), list[Outcome](), number + 1
        taken = 0
        while True:
            began, num_starts = time.monotonic(), len(view.starts())
            group = Group(run, num_workers)
            if len(outcomes) + len(found) < num_kills:
                # The first launch shows how long a run takes; kills come at any moment of one.
                _pause(group, rng.uniform(0.2, 1.2 * seconds) if seconds else 8.0)
            has_ended = group.is_over() or len(outcomes) + len(found) >= num_kills
            is_well = group.end() if has_ended else False
            if has_ended and is_well:
                seconds = seconds or time.monotonic() - began
            elif has_ended:
                raise LostError(f"{name}: the run failed; see {run.out}.log")
            else:
                rng.choice(group.processes).kill()
                group.kill()
            for start in view.starts()[num_starts:]:
                lost = max(0, taken - view.total(start.stage, start.step))
                if found:
                    found[-1] = replace(found[-1], lost_steps=lost, seconds=time.monotonic() - began)
            taken = view.taken()
            if has_ended:
                break
            found.append(Outcome(name))
        difference = loss_difference(losses_of(view.out), wanted)
        outcomes += [outcome.with_losses(difference) for outcome in found]
    return outcomes


def damage_checkpoints(config: TrainConfig, wanted: Losses) -> list[Outcome]:
    """Damages the newest checkpoint of a run in every way, each time in a copy, and lets the run go on.

    Args:
        config: The run, in one process.
        wanted: Losses of the undisturbed run.
    """
    view = RunView(Path(config.out))
    group = Group(config, 0)
    wait_for(
        lambda: (
            view.saved() >= view.total(view.starts()[-1].stage, 0) + 2 * config.checkpoint_every
            if view.starts()
            else False
        ),
        _PATIENCE,
        "two checkpoints",
    )
    group.kill()
    outcomes = []
    for number, (name, damage) in enumerate(_damages(_newest(Path(config.out)))):
        run = replace(config, out=f"{config.out}-{number}")
        shutil.copytree(config.out, run.out)
        damage(_newest(Path(run.out)))
        outcomes.append(_gone_on(name, run, view.saved(), wanted))
    return [*outcomes, _full_disk(config, view.saved(), wanted)]


def _gone_on(name: str, run: TrainConfig, saved: int, wanted: Losses) -> Outcome:
    """Lets a run go on that should be able to; what it lost is counted from its newest checkpoint, now damaged."""
    view, began = RunView(Path(run.out)), time.monotonic()
    num_starts = len(view.starts())
    is_well = Group(run, 0).end()
    outcome = Outcome(name, seconds=time.monotonic() - began)
    if not is_well or len(view.starts()) == num_starts:
        return outcome
    start = view.starts()[num_starts]
    lost = max(0, saved - view.total(start.stage, start.step))
    return replace(outcome, lost_steps=lost).with_losses(loss_difference(losses_of(view.out), wanted))


def _full_disk(config: TrainConfig, saved: int, wanted: Losses) -> Outcome:
    """Lets a run go on where no file of the size of a checkpoint can be written, and then where it can."""
    run = replace(config, out=f"{config.out}-full")
    shutil.copytree(config.out, run.out)
    if Group(run, 0, max_file_bytes=_SMALL_FILE).end():
        raise LostError(f"a checkpoint of {run.out} was written although the disk was full")
    return _gone_on("disk full", run, saved, wanted)


def _newest(out: Path) -> Path:
    return max(path for path in (out / CHECKPOINTS).iterdir() if path.name[0].isdigit())


def _damages(newest: Path) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Yields ways to damage a checkpoint like this one, with a name for each."""
    files = sorted(path.name for path in newest.iterdir())
    for file in files:
        yield f"{file} changed", lambda folder, file=file: _change(folder / file)
        yield f"{file} cut off", lambda folder, file=file: _cut_off(folder / file)
        yield f"{file} missing", lambda folder, file=file: (folder / file).unlink()
    last = max(newest.iterdir(), key=lambda path: path.stat().st_mtime_ns).name
    yield "half-written", lambda folder: _leave_half(folder, last)


def _change(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def _cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _leave_half(folder: Path, last: str) -> None:
    """Leaves what a kill in the midst of writing leaves: the file that is written last is missing, another cut off."""
    (folder / last).unlink()
    for path in folder.iterdir():
        _cut_off(path)


def _pause(group: Group, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not group.is_over():
        time.sleep(0.01)
