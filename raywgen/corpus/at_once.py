"""The number of networks that are held at once, wherever all of a split are gone through."""

from __future__ import annotations

_VALUES = 1 << 22
_NETWORKS = 512


def networks_at_once(num_values: int) -> int:
    """Returns how many networks of D values are read or run together: many small ones, large ones one by one."""
    return min(max(_VALUES // max(num_values, 1), 1), _NETWORKS)
