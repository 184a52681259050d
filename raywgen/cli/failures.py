"""Errors and warnings of commands, each in one line."""

from __future__ import annotations

import sys

from rich.console import Console

from raywgen.config import ConfigError
from raywgen.progress import plain

# What torch says where the memory of the host is used up.
_NO_MEMORY = "can't allocate memory"
_KNOWN = (ValueError, KeyError, OSError, RuntimeError, MemoryError)


def print_aside(line: str) -> None:
    """Prints a line of rich markup to standard error."""
    Console(stderr=True, emoji=False).print(line, highlight=False, soft_wrap=True)


def print_warning(message: Warning | str, category: type[Warning], *_: object) -> None:
    """Prints a warning in one line, without the place in raywgen's own code."""
    print_aside(f"[yellow]{category.__name__}:[/yellow] {plain(str(message))}")


def is_one_line(error: Exception) -> bool:
    """Whether an error is one of a user's mistakes or of the surroundings, and not a fault of raywgen's own."""
    return isinstance(error, _KNOWN) or _is_rays(error)


def line_of(error: Exception) -> str:
    """Returns what a user reads of an error."""
    if isinstance(error, OSError) and not isinstance(error, ConfigError):
        reason = str(error.strerror or error)
        return reason if error.filename is None else f"{error.filename}: {reason}"
    if isinstance(error, MemoryError) or (type(error) is RuntimeError and _NO_MEMORY in str(error)):
        reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        return (
            f"this machine has no memory left ({reason}); end other programs, give smaller batches or windows, or see "
            "by `raywgen plan` what a run needs"
        )
    return str(error.args[0]) if error.args else str(error)


def _is_rays(error: Exception) -> bool:
    """Whether Ray itself raised the error, and not our own code in one of its workers."""
    exceptions = sys.modules.get("ray.exceptions")
    return (
        exceptions is not None
        and isinstance(error, exceptions.RayError)
        and not isinstance(error, exceptions.RayTaskError)
    )
