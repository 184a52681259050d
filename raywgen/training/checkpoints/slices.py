"""Slices: consecutive values of flat tensors, of which each worker writes and reads its own.

Together the workers' slices of a checkpoint are the whole of it. What a worker alone holds, such as its shard under
ZeRO, it writes itself; what every worker holds is divided among them, so that each writes as many bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Slice:
    """The values of a tensor that one worker writes.

    Attributes:
        shape: Shape of the whole tensor.
        start: Number of the first value of the slice in the flat tensor.
        values: The values, flat.
    """

    shape: tuple[int, ...]
    start: int
    values: Tensor

    @property
    def stop(self) -> int:
        """Number of the first value after the slice."""
        return self.start + self.values.numel()

    def on_host(self) -> Slice:
        """Copies the values into the host's memory, where no training step changes them."""
        return Slice(self.shape, self.start, self.values.detach().to("cpu", copy=True))


Part = Tensor | Slice
"""A tensor that every worker holds in whole, or the slice of one that this worker alone holds."""


def own_slices(state: Mapping[str, Part], rank: int, num_workers: int) -> dict[str, Slice]:
    """Returns the slices that a worker writes.

    Args:
        state: The state of a run. All workers must give the tensors that they hold in whole in the same order.
        rank: Number of this worker.
        num_workers: Number of all workers.
    """
    whole = {name: part for name, part in state.items() if isinstance(part, Tensor)}
    total = sum(tensor.numel() * tensor.dtype.itemsize for tensor in whole.values())
    begin, end = total * rank // num_workers, total * (rank + 1) // num_workers
    found, place = {}, 0
    for name, tensor in whole.items():
        size, num = tensor.dtype.itemsize, tensor.numel()
        start, stop = (min(max(-((place - cut) // size), 0), num) for cut in (begin, end))
        if start < stop or (num == rank == 0):
            found[name] = Slice(tuple(tensor.shape), start, tensor.detach().reshape(-1)[start:stop])
        place += num * size
    # A worker has no values of a small tensor that is divided among many.
    return found | {name: part for name, part in state.items() if isinstance(part, Slice) and part.values.numel()}
