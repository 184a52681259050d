"""Adapters of a text encoder in the form of the PEFT library, from networks of the recipe `lora` on `upper-layers`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raywgen.tasks.networks.text_models import PACKAGED, PACKAGED_NAME
from raywgen.trust import HUB
from raywgen.weights import StateDict
from raywgen.weights.adapters import LoRAAdapter

HEAD = "head.safetensors"
"""The file beside an adapter that holds its head: `classifier.weight`, `(C, H)`, and `classifier.bias`.

It reads the mean of the last hidden states over a sentence's tokens, divided by the root of its mean square.
"""
_CLASSIFIER = "classifier."


def is_text_adapter(recipe: Mapping[str, Any]) -> bool:
    """Whether a recipe is of adapters of the upper layers of a text encoder."""
    base = recipe.get("base")
    return recipe.get("name") == "lora" and isinstance(base, Mapping) and base.get("name") == "upper-layers"


def has_fitted_head(recipe: Mapping[str, Any]) -> bool:
    """Whether a recipe is of networks whose head is fitted to examples; the network need not be built to know."""
    return is_text_adapter(recipe) and recipe["base"].get("head") == "fitted"


def text_adapter(recipe: Mapping[str, Any], state: StateDict) -> tuple[LoRAAdapter, StateDict]:
    """Splits the weights of such a network into an adapter of the whole encoder, and the tensors of its head.

    Args:
        recipe: Recipe of the network.
        state: Its `state_dict`.
    """
    assert is_text_adapter(recipe)
    names = [name.removesuffix(".lora_A") for name in state if name.endswith(".lora_A")]
    factors = {name: (state[f"{name}.lora_A"], state[f"{name}.lora_B"]) for name in names}
    alpha = recipe.get("alpha")
    scale = 1.0 if alpha is None else float(alpha) / int(recipe["rank"])
    path = str(recipe["base"].get("path", PACKAGED))
    whole = {name: tensor for name, tensor in state.items() if not name.endswith((".lora_A", ".lora_B"))}
    head = {name: tensor for name, tensor in whole.items() if name.startswith(_CLASSIFIER)}
    adapter = LoRAAdapter(
        factors=factors,
        scales=dict.fromkeys(names, scale),
        whole={name: tensor for name, tensor in whole.items() if name not in head},
        base=PACKAGED_NAME if path == PACKAGED else path.removeprefix(HUB),
    )
    return adapter, head
