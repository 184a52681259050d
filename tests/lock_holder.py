"""A process of its own that holds a folder until it is killed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_HOLD = """
import sys
from raywgen import leases
from raywgen.locks import only_one
leases.BEAT_SECONDS, leases.SETTLE_SECONDS = 0.5, 0.1
with only_one(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def lock_holder(folder: str | Path) -> Iterator[subprocess.Popen[str]]:
    """Yields the process, once it holds the folder."""
    command = [sys.executable, "-c", _HOLD, str(folder)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    try:
        yield holder
    finally:
        holder.kill()
        holder.wait()
