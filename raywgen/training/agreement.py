"""All workers must see the same run before the first step: parts of one global batch would overlap otherwise."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, distributed

_BYTES = 32


class WorkersDisagreeError(RuntimeError):
    """Workers hold different data, settings or versions; the message names the ranks and what differs."""


def check_agreement(parts: Mapping[str, str], device: torch.device) -> None:
    """Compares what all ranks of the process group hold; every rank must call it with the same names.

    Args:
        parts: Description of each part -> its content.
        device: The device on which the process group's backend exchanges tensors.

    Raises:
        WorkersDisagreeError: A rank differs from the first one; all ranks raise it.
    """
    digests = b"".join(hashlib.sha256(content.encode()).digest() for content in parts.values())
    mine = torch.frombuffer(bytearray(digests), dtype=torch.uint8).to(device)
    gathered = [torch.empty_like(mine) for _ in range(distributed.get_world_size())]
    distributed.all_gather(gathered, mine)
    first, *others = (found.cpu().view(len(parts), _BYTES) for found in gathered)
    for rank, other in enumerate(others, start=1):
        different = [
            name for name, is_same in zip(parts, (first == other).all(dim=1).tolist(), strict=True) if not is_same
        ]
        if different:
            raise WorkersDisagreeError(
                f"rank {rank} has another {', another '.join(different)} than rank 0, so their batches would not fit "
                "together; give all nodes the same corpus, run folder and versions of raywgen and torch"
            )


def exchange(text: str, device: torch.device) -> list[str]:
    """Returns the texts of all ranks of the process group, in order; every rank must call it.

    Args:
        text: The text of this rank.
        device: The device on which the process group's backend exchanges tensors.
    """
    own = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(device) if text else None
    length = torch.tensor([0 if own is None else len(own)], device=device)
    lengths = [torch.zeros_like(length) for _ in range(distributed.get_world_size())]
    distributed.all_gather(lengths, length)
    longest = max(int(found) for found in lengths)
    if not longest:
        return [""] * len(lengths)
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    if own is not None:
        padded[: len(own)] = own
    texts = [torch.empty_like(padded) for _ in lengths]
    distributed.all_gather(texts, padded)
    return [bytes(found[: int(num)].tolist()).decode() for found, num in zip(texts, lengths, strict=True)]


def share(tensors: Iterable[Tensor]) -> None:
    """Gives all ranks of the process group the first one's values of some tensors, in place."""
    for tensor in tensors:
        sent = tensor.detach().contiguous()
        distributed.broadcast(sent, 0)
        tensor.detach().copy_(sent)
