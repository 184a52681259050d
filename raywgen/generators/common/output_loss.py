"""Measures whether a reconstructed network has the outputs of the original."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from raywgen.nn.batch_norm import differentiable
from raywgen.tasks import stacked_logits
from raywgen.weights import Layout, WeightBatch


class RebuildError(ValueError):
    """A network that cannot be run with the weights that the corpus holds; the message names the tensor."""


def output_loss(values_BD: Tensor, batch: WeightBatch) -> Tensor:
    """Returns `KL(p || q) = mean_S sum_C p log(p / q)` in nats, `(B,)`, differentiable in the weights.

    p are the class probabilities of the batch's own networks on its query samples, q those of the given networks
    (Hinton et al. 2015, arXiv 1503.02531, at temperature 1). Batch normalisation uses the stored running statistics.

    Args:
        values_BD: Flat vectors of the batch's layout.
        batch: Its networks, module and query samples are used.
    """
    with torch.no_grad():
        log_p_BSC = _log_probabilities(batch.values_BD, batch)
    log_q_BSC = _log_probabilities(values_BD, batch)
    return (log_p_BSC.exp() * (log_p_BSC - log_q_BSC)).sum(dim=-1).mean(dim=-1)


def check_module(module: nn.Module, layout: Layout) -> None:
    """Asserts that a network takes weights of a layout.

    Raises:
        RebuildError: A tensor is missing, unknown or of another shape.
    """
    built = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    wanted = {spec.name: spec.shape for spec in layout.tensors}
    for name in [*wanted, *built]:
        if built.get(name) != wanted.get(name):
            raise RebuildError(
                f"tensor '{name}' is {_shape_text(built, name)} in the network that the corpus' recipe builds and "
                f"{_shape_text(wanted, name)} in its checkpoints, so these cannot be run; give the corpus the recipe "
                "of its own network, or tokenizer.output_loss_weight=0"
            )


def _log_probabilities(values_BD: Tensor, batch: WeightBatch) -> Tensor:
    """Runs the networks in evaluation mode, in which they are used."""
    module = differentiable(batch.module, "stored")
    is_training = module.training
    module.eval()
    logits_BSC = stacked_logits(module, batch.layout.unflatten(values_BD), batch.query.samples_BSF)
    module.train(is_training)
    return logits_BSC.float().log_softmax(dim=-1)


def _shape_text(shapes: dict[str, tuple[int, ...]], name: str) -> str:
    return str(list(shapes[name])) if name in shapes else "missing"
