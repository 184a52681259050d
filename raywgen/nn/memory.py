"""The memory that a process may use."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def free_memory(device: torch.device, num_sharing: int = 1) -> int:
    """Returns the free bytes of a device.

    Args:
        device: A GPU, or the CPU for the memory of the host.
        num_sharing: Workers that share the memory of the host; each may use as much as the others.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return host_memory() // num_sharing


def host_memory(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int:
    """Returns the free bytes of the host, or of the control group (version 2) that this process is held to.

    Args:
        meminfo: The kernel's account of the host.
        cgroup: Folder of the control group; a file that is missing sets no limit.
    """
    found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
    assert found, f"{meminfo} holds no MemAvailable"
    free = int(found[1]) * 1024
    limit = _number(cgroup / "memory.max")
    if limit is None:
        return free
    # Cached pages of files count as used, and are given back when they are needed.
    cached = re.search(r"^inactive_file (\d+)", _text(cgroup / "memory.stat"), re.MULTILINE)
    used = (_number(cgroup / "memory.current") or 0) - (int(cached[1]) if cached else 0)
    return max(0, min(free, limit - used))


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def gib(num: float) -> str:
    """Returns bytes as text, in GiB."""
    return f"{num / 2**30:.3g} GiB"


def max_min_share(nodes: Sequence[tuple[int, int]], num_workers: int) -> int:
    """Returns the memory that every worker can have if they are spread over nodes so that it is the most.

    Args:
        nodes: Memory of each node, and the most workers that it takes.
        num_workers: Workers to place; at most as many as the nodes take.
    """
    shares = sorted({memory // count for memory, slots in nodes for count in range(1, slots + 1)}, reverse=True)
    for share in shares:
        if sum(min(slots, memory // max(1, share)) for memory, slots in nodes) >= num_workers:
            return share
    return shares[-1] if shares else 0
