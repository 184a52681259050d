"""Checks whether a generator can fill a module, and generates the values of one network by adapting."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from raywgen.generators import GenerationRequest, Generator
from raywgen.tasks.user_data import ConditionError
from raywgen.weights import Condition, KeyedNoise, Layout


class UnknownLayoutError(ValueError):
    """The generator cannot fill a layout by adapting; the message says which layouts it can."""


class UnknownLayoutWarning(UserWarning):
    """The generator fills a layout that it was never trained on."""


def adapt_weights(generator: Generator, layout: Layout, condition: Condition, temperature: float, seed: int) -> Tensor:
    """Generates the flat vector `(D,)` of one network, on the CPU.

    Raises:
        UnknownLayoutError: The generator has no normaliser for the layout.
    """
    check_known(generator, layout)
    device = generator.device
    request = GenerationRequest(
        condition=condition.to(device),
        layout=layout,
        noise=KeyedNoise(seed, torch.arange(1, device=device), 0),
        temperature=temperature,
    )
    return generator.generate(request).values_BD[0].cpu()


def check_known(generator: Generator, layout: Layout) -> None:
    """Refuses a layout that the generator was not trained on.

    Raises:
        UnknownLayoutError: The generator was not trained on it.
    """
    if not generator.knows(layout):
        known = "; ".join(
            ", ".join(f"{spec.name} {list(spec.shape)}" for spec in other.generated[:3])
            for other, _ in generator.normalizers.values()
        )
        raise UnknownLayoutError(
            f"the generator was never trained on a layout of {layout.num_values} values like this one; it knows {known}"
        )


def check_module(module: object) -> None:
    """Refuses anything but a module whose values can be read and replaced."""
    name = getattr(module, "__name__", type(module).__name__)
    if not isinstance(module, nn.Module):
        raise ConditionError(f"{name} is no nn.Module; give a module that was built, such as nn.Linear(64, 2)")
    if isinstance(module, torch.jit.ScriptModule):
        raise ConditionError(f"{name} is TorchScript; give the module that it was made from")
    if any(is_lazy(value) for value in module.state_dict(keep_vars=True).values()):
        raise ConditionError(f"{name} has lazy layers that have no shape yet; run it once on a sample first")
