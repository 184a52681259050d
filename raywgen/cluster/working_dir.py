"""Lists what Ray would upload of a working directory, by Ray's own ignore rules, before it does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from raywgen.compat import packed_paths
from raywgen.ray_address import ClusterError

MAX_MIB = 100
"""Every node fetches the package for every job; data belongs on storage that all nodes share."""

_MIB = 2**20
_NAMED = 3


def uploaded_files(folder: str | Path, excludes: Sequence[str] = ()) -> dict[str, int]:
    """Relative path and size in bytes of each file that Ray would pack.

    Ray packs without compression, so the sum is the size of the package but for its table of contents.

    Args:
        folder: The working directory.
        excludes: Patterns of the runtime environment, which hold beside those of ignore files.
    """
    root = Path(folder).absolute()
    return {str(path.relative_to(root)): path.stat().st_size for path in packed_paths(root, excludes) if path.is_file()}


def check_working_dir(folder: str | Path, max_mib: float = MAX_MIB, excludes: Sequence[str] = ()) -> int:
    """Refuses a working directory that is too large to be sent with every job.

    Args:
        folder: The working directory.
        max_mib: Size that is refused beyond.
        excludes: Patterns of the runtime environment.

    Returns:
        Bytes that will be packed.

    Raises:
        ClusterError: It is no folder, or larger than `max_mib`; the largest parts are named.
    """
    if not Path(folder).is_dir():
        raise ClusterError(f"working directory {folder} is no folder; give --working-dir, such as a clone of raywgen")
    files = uploaded_files(folder, excludes)
    total = sum(files.values())
    if total > max_mib * _MIB:
        ignored = Path(folder) / ".rayignore"
        largest = ", ".join(f"{name} ({size / _MIB:.1f} MiB)" for name, size in _parts(files).most_common(_NAMED))
        raise ClusterError(
            f"working directory {folder} is {total / _MIB:.0f} MiB and would be sent with every job (at most "
            f"{max_mib:g}): largest are {largest}; add them to {ignored}, and data to shared storage"
        )
    return total


def _parts(files: dict[str, int]) -> Counter[str]:
    """Sizes by the first two levels of folders."""
    parts: Counter[str] = Counter()
    for name, size in files.items():
        head, _, rest = name.partition("/")
        below, slash, _ = rest.partition("/")
        parts[f"{head}/{below}{slash}" if rest else head] += size
    return parts
