"""Lists the files of a working directory that Ray would upload, by Ray's own ignore rules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from raywgen.compat import packed_paths
from raywgen.ray_address import ClusterError

MAX_MIB = 100
"""Largest working directory in MiB: every node fetches it for every job, so data belongs on shared storage."""

_MIB = 2**20
_NAMED = 3


def uploaded_files(folder: str | Path, excludes: Sequence[str] = ()) -> dict[str, int]:
    """Returns the relative path and the size in bytes of each file that Ray would pack.

    Ray packs without compression, so the sum is the size of the package without its table of contents.

    Args:
        folder: The working directory.
        excludes: Patterns of the runtime environment, applied in addition to ignore files.
    """
    root = Path(folder).absolute()
    return {str(path.relative_to(root)): path.stat().st_size for path in packed_paths(root, excludes) if path.is_file()}


def check_working_dir(folder: str | Path, excludes: Sequence[str] = ()) -> int:
    """Refuses a working directory that is too large to be sent with every job.

    Args:
        folder: The working directory.
        excludes: Patterns of the runtime environment.

    Returns:
        Number of bytes that will be packed.

    Raises:
        ClusterError: The path is no folder, or larger than `MAX_MIB`; the message names the largest parts.
    """
    if not Path(folder).is_dir():
        raise ClusterError(f"working directory {folder} is no folder; give --working-dir, such as a clone of raywgen")
    files = uploaded_files(folder, excludes)
    total = sum(files.values())
    if total > MAX_MIB * _MIB:
        ignored = Path(folder) / ".rayignore"
        largest = ", ".join(f"{name} ({size / _MIB:.1f} MiB)" for name, size in _parts(files).most_common(_NAMED))
        raise ClusterError(
            f"working directory {folder} is {total / _MIB:.0f} MiB and would be sent with every job (at most "
            f"{MAX_MIB}): largest are {largest}; add them to {ignored}, and data to shared storage"
        )
    return total


def _parts(files: dict[str, int]) -> Counter[str]:
    """Sums sizes by the first two levels of folders."""
    parts: Counter[str] = Counter()
    for name, size in files.items():
        head, _, rest = name.partition("/")
        below, slash, _ = rest.partition("/")
        parts[f"{head}/{below}{slash}" if rest else head] += size
    return parts
