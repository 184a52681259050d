"""Kind and sizes of a network that reads support sets and writes weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

NetworkKind = Literal["auto", "head", "flat", "chunks", "latents"]


MAX_ROWS = 16
"""Windows of all networks that are written at once, by default."""


@dataclass(kw_only=True)
class NetworkConfig:
    """A network from states and support sets to weights.

    Attributes:
        kind: `head` (equivariant to the order of classes), `flat` (one small layout, all values at once), `chunks`
            (any layouts), `latents` (of a tokeniser's chunks, for large ones), or `auto`: `head` where every layout is
            one linear layer on the task's samples, `flat` where there is one of at most 16,384 values.
        width: H.
        num_layers: Blocks.
        num_heads: Attention heads of `chunks`; twice as many must divide `width`.
        chunk_length: K of `chunks`.
        window: Most chunks that `chunks` and `latents` see at once. Longer networks are trained on random windows of so
            many chunks, and written window by window, none of which sees another. 0 for whole networks.
    """

    kind: NetworkKind = "auto"
    width: int = 256
    num_layers: int = 2
    num_heads: int = 4
    chunk_length: int = 32
    window: int = 512

    def __post_init__(self) -> None:
        counts = ("num_layers", "chunk_length", "num_heads", "width")
        if min(getattr(self, name) for name in counts) < 1:
            raise ValueError(f"{', '.join(counts)}: at least 1")
        if self.window < 0:
            raise ValueError(f"window={self.window}: give a number of chunks, or 0 for whole networks")
        if self.width % (2 * self.num_heads):
            raise ValueError(f"width={self.width} must be a multiple of 2 * num_heads={2 * self.num_heads}")
