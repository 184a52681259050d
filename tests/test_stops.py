"""Real processes and real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from raywgen.stops import Stopped, keeping, stop_signals

_COMMAND = """
import sys
import time
from raywgen import cli
from raywgen.stops import keeping

@cli.app.command("wait")
def wait() -> None:
    with keeping("the first half is kept; the same command goes on"):
        print("begun", flush=True)
        time.sleep(60)

sys.argv = ["raywgen", "wait"]
cli.main()
"""


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_a_command_ends_with_one_line_and_the_status_of_the_signal(number: signal.Signals, name: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _COMMAND], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(number)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert message == f"stopped by {name}: the first half is kept; the same command goes on\n"


def test_within_awaited_the_first_signal_is_only_noted_and_the_second_one_breaks_off() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_signals(60) as stop, stop.awaited():
        assert not stop.asked()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked()
        with pytest.raises(Stopped) as stopped:
            os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_after_the_grace_time_the_block_is_broken_off() -> None:
    with stop_signals(0.05) as stop, stop.awaited():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Stopped) as stopped:
            threading.Event().wait(60)
    assert stopped.value.code == 130


def test_what_is_kept_is_said_by_the_innermost_block() -> None:
    with pytest.raises(Stopped, match="stopped by SIGTERM: inner"), keeping("outer"), keeping("inner"):
        raise Stopped(signal.SIGTERM)


def test_another_thread_leaves_signals_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen: list[object] = []

    def look() -> None:
        with stop_signals() as stop:
            seen.extend([signal.getsignal(signal.SIGINT), stop.asked()])

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [before, False]
