"""Pieces: consecutive parts of a large network that are generated one by one, in memory that the network does not set.

Shape letters beyond the legend in `raywgen.weights`: X values of a piece.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Consecutive values of a network, or several networks of one layout, that are generated at once.

    Attributes:
        index: Number of the piece in its network.
        start: First value of the flat vector.
        stop: End index, exclusive. A piece without values writes what other pieces read.
        units: First and end of the method's own units that the piece consists of, such as groups of windows.
        needs: The earlier pieces whose `kept` tensors this one reads.
    """

    index: int
    start: int
    stop: int
    units: tuple[int, int] = (0, 1)
    needs: tuple[int, ...] = ()

    @property
    def num_values(self) -> int:
        """X, the number of values of each network."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedPiece:
    """The values of a piece of B networks.

    Attributes:
        values_BX: Values, float32.
        log_prob_B: The piece's share of the log-probability of each network in nats, float64; None where the method has
            no density.
        kept: Small tensors by name, which the pieces that need this one read.
    """

    values_BX: Tensor
    log_prob_B: Tensor | None
    kept: Mapping[str, Tensor] = field(default_factory=dict)

    def cpu(self) -> GeneratedPiece:
        """Copies the piece to the CPU."""
        return GeneratedPiece(
            values_BX=self.values_BX.cpu(),
            log_prob_B=None if self.log_prob_B is None else self.log_prob_B.cpu(),
            kept={name: tensor.cpu() for name, tensor in self.kept.items()},
        )


def joined_units(sizes: list[int], max_values: int) -> list[tuple[int, int]]:
    """Groups consecutive units into runs of at most `max_values` values; a larger unit is a run of its own.

    Args:
        sizes: Number of values of each unit, in order.
        max_values: Most values of a run.

    Returns:
        First and end of each run.
    """
    runs: list[tuple[int, int]] = []
    first = total = 0
    for unit, size in enumerate(sizes):
        if unit > first and total + size > max_values:
            runs.append((first, unit))
            first, total = unit, 0
        total += size
    return [*runs, (first, len(sizes))] if sizes else []
