"""Measures the sharpness of a minimum.

Shape legend: S samples, F features, D trainable values.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def largest_eigenvalue(
    module: nn.Module, x_SF: Tensor, labels_S: Tensor, *, num_iterations: int = 50, seed: int = 0
) -> float:
    """Returns the largest eigenvalue of the Hessian of the mean cross-entropy, by power iteration.

    It is the largest in magnitude, so it is negative only where the steepest curvature is downwards.

    Args:
        module: The network, in eval mode, so that samples do not affect each other.
        x_SF: Inputs.
        labels_S: Labels, int64.
        num_iterations: Hessian-vector products.
        seed: Seed of the first direction.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    loss = nn.functional.cross_entropy(module(x_SF), labels_S)
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    gradient_D = torch.cat([gradient.reshape(-1) for gradient in gradients])
    generator = torch.Generator().manual_seed(seed)
    direction_D = torch.randn(len(gradient_D), generator=generator, dtype=gradient_D.dtype)
    direction_D /= direction_D.norm()
    value = 0.0
    for _ in range(num_iterations):
        products = torch.autograd.grad(gradient_D @ direction_D, parameters, retain_graph=True)
        product_D = torch.cat([product.reshape(-1) for product in products])
        value = float(direction_D @ product_D)
        norm = product_D.norm()
        if norm == 0:
            return 0.0
        direction_D = product_D / norm
    return value
