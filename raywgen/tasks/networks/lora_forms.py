"""Forms of low-rank adapters: both factors are written, B alone, or a small core between frozen factors.

Frozen factors are singular vectors of the frozen weight itself, so they need no memory and are the same everywhere
(LoRA-XS, Bałazy et al., arXiv 2405.17604). They leave no freedom of gauge: two different adapters have different
products.

Shape legend: O output channels, I input values that an output sees, R rank.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

Form = Literal["factors", "b", "core"]
SUFFIXES: dict[Form, tuple[str, ...]] = {"factors": ("lora_A", "lora_B"), "b": ("lora_B",), "core": ("lora_core",)}
"""Names of what is trained, after that of the module."""
EVERY_SUFFIX = tuple(sorted({f".{suffix}" for suffixes in SUFFIXES.values() for suffix in suffixes}))
"""Ends of the names of all such tensors."""


def starts(form: Form, frozen_OI: Tensor, rank: int) -> dict[str, Tensor]:
    """Returns what is trained at the start, by suffix, so that the product of the factors is zero."""
    num_out, num_in = frozen_OI.shape
    if form == "core":
        return {"lora_core": frozen_OI.new_zeros(rank, rank)}
    b_OR = frozen_OI.new_zeros(num_out, rank)
    if form == "b":
        return {"lora_B": b_OR}
    return {"lora_A": nn.init.kaiming_uniform_(frozen_OI.new_empty(rank, num_in), a=math.sqrt(5)), "lora_B": b_OR}


@torch.no_grad()
def frozen_factors(form: Form, frozen_OI: Tensor, rank: int) -> tuple[Tensor, ...]:
    """Returns the factors that stay as they are: none, A `(R, I)`, or A and the outer `(O, R)` around a core.

    A holds the first right singular vectors of the weight, and the outer factor the first left ones, each with its
    largest entry positive.
    """
    if form == "factors":
        return ()
    left_OK, _, right_KI = torch.linalg.svd(frozen_OI.detach().float(), full_matrices=False)
    a_RI = right_KI[:rank]
    sign_R = a_RI.gather(1, a_RI.abs().argmax(dim=1, keepdim=True)).sign().flatten()
    a_RI = (sign_R.unsqueeze(1) * a_RI).to(frozen_OI.dtype)
    return (a_RI,) if form == "b" else (a_RI, (left_OK[:, :rank] * sign_R).to(frozen_OI.dtype))


def factors(form: Form, trained: tuple[Tensor, ...], frozen: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Returns A `(R, I)` and B `(O, R)` of an adapter.

    Args:
        form: What is trained.
        trained: The tensors of `SUFFIXES[form]`, in that order.
        frozen: Those of `frozen_factors`.
    """
    if form == "factors":
        a_RI, b_OR = trained
        return a_RI, b_OR
    if form == "b":
        return frozen[0], trained[0]
    return frozen[0], frozen[1] @ trained[0]
