"""raywgen: train generators of neural-network weights on a Ray cluster, and put them to use.

generator = raywgen.load("runs/demo/igpg")
model = generator.fill(MyNet(), instruction="Is the digit one of 1, 4 or 7?", data=(samples, labels))
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

# Torch then asks for large pages for blocks of 2 MiB and more. In training these blocks are new at every step, and to
# be given their small pages one by one can take longer than the computation. Torch reads it when it first allocates.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

from raywgen.trust import trusting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from raywgen.generation import TrainedGenerator
    from raywgen.weights.adapters import Injected, LoRAAdapter

__version__ = "0.2.0"
__all__ = ["__version__", "inject", "load", "reestimate_statistics", "trusting"]


def load(path: str | Path, *, trust: Sequence[str] = ()) -> TrainedGenerator:
    """Loads a trained generator from a run folder or a bundle; see `raywgen.generation.loading.load`.

    Args:
        path: The folder: a local path, a URI such as `s3://bucket/run`, or `hf://owner/name`.
        trust: Packages and addresses that its encoders may come from, such as `("mynets",)`.
    """
    # Imported late: the science below must import where Ray is not installed.
    from raywgen.generation import load as load_generator

    return load_generator(path, trust=trust)


def inject(module: nn.Module, adapter: LoRAAdapter | str | Path) -> Injected:
    """Adds a low-rank adapter to a live module in place; see `raywgen.weights.adapters.inject`.

    Args:
        module: The base model, such as a transformer.
        adapter: The adapter, or its folder as the PEFT library writes it.

    Returns:
        A handle whose `reset()` puts the module's own values back; it is a context manager, too.
    """
    from raywgen.weights.adapters import inject as inject_adapter

    return inject_adapter(module, adapter)


def reestimate_statistics(
    module: nn.Module,
    x: Tensor | Iterable[Tensor | Sequence[Tensor]],
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """Estimates running statistics of batch normalisation; see `raywgen.nn.batch_norm.reestimate_statistics`.

    Args:
        module: The network; it does not change.
        x: One batch of inputs, or any number, such as a shuffled `DataLoader`, of which memory holds one at a time.
        on_progress: Called after each batch with the number of inputs so far.

    Returns:
        Entries for `module.load_state_dict(..., strict=False)`.
    """
    from raywgen.nn.batch_norm import reestimate_statistics as estimate

    return estimate(module, x, on_progress)
