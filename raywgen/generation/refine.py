"""Refines written networks on inputs that their generator remembers, with the labels that it predicts for these.

What a generator knows of a task is then put to use through the module's own forward, whatever its architecture is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from raywgen.generators.interface import Remembered
from raywgen.tasks import FitConfig, FitData, Recorded, fit
from raywgen.weights import Layout

_LEARNING_RATE = 3e-3
_BATCH = 64


def refined(module: nn.Module, layout: Layout, values_BD: Tensor, remembered: Remembered) -> Tensor:
    """Returns networks `(B, D)` after some steps on remembered inputs.

    One network after another, so that none depends on those it was written with.

    Args:
        module: A network of the layout, in the mode in which it is trained.
        layout: The layout.
        values_BD: The written networks.
        remembered: Inputs as the module takes them, labels, and the number of steps.
    """
    config = FitConfig(
        learning_rate=_LEARNING_RATE,
        schedule="cosine",
        num_steps=remembered.num_steps,
        batch_size=min(_BATCH, len(remembered.inputs_MF)),
    )
    found = []
    for values_D, labels_M in zip(values_BD, remembered.labels_BM, strict=True):
        state = layout.unflatten(values_D.unsqueeze(0), counters=module.state_dict())
        with torch.enable_grad():
            (last,) = fit(
                module,
                Recorded(step=0, state_N=state),
                FitData(x=remembered.inputs_MF, labels_NS=labels_M.unsqueeze(0)),
                config,
                order_seeds=[0],
                record_steps=[config.num_steps],
                execution="sequential",
            )
        found.append(layout.flatten({name: tensor[0] for name, tensor in last.state_N.items()}))
    return torch.stack(found).to(values_BD)
