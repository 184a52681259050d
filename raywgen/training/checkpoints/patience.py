"""Tries again what a storage has refused, as object stores and network drives fail for seconds at a time."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from raywgen.inputs import UnusableFileError
from raywgen.storage import NoSuchFileError, StorageError

T = TypeVar("T")
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)
"""Seconds between tries: two minutes in all."""
# A full disk, a missing permission, or a file in the place of a folder stay until somebody does something about them.
_LASTING = {
    errno.ENOSPC,
    errno.EFBIG,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENOENT,
}


def patiently(action: Callable[[], T], pauses: Sequence[float] = PAUSES) -> T:
    """Returns what an action returns, which is tried again after errors that may pass.

    Raises:
        StorageError, OSError: The error lasts.
    """
    for pause in pauses:
        try:
            return action()
        except (StorageError, OSError) as error:
            if is_lasting(error):
                raise
        time.sleep(pause)
    return action()


def is_lasting(error: BaseException) -> bool:
    """Whether trying again is of no use."""
    reasons = [error, error.__cause__]
    return any(
        isinstance(one, (NoSuchFileError, UnusableFileError)) or getattr(one, "errno", None) in _LASTING
        for one in reasons
    )
