"""Adapters of text models in the form of the PEFT library: of the recipe `lora` on `upper-layers` or `causal-lm`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raywgen.tasks.networks.causal_lm import causal_name
from raywgen.tasks.networks.text_models import PACKAGED, PACKAGED_NAME
from raywgen.trust import HUB
from raywgen.weights import StateDict
from raywgen.weights.adapters import LoRAAdapter

HEAD = "head.safetensors"
"""The file beside an adapter that holds its head: `classifier.weight`, `(C, H)`, and `classifier.bias`.

It reads the mean of the last hidden states over a sentence's tokens, divided by the root of its mean square.
"""
_CLASSIFIER = "classifier."
_CAUSAL = "causal-lm"
_BASES = ("upper-layers", _CAUSAL)


def is_text_adapter(recipe: Mapping[str, Any]) -> bool:
    """Whether a recipe is of adapters of the upper layers of a text encoder, or of a causal language model."""
    base = recipe.get("base")
    return recipe.get("name") == "lora" and isinstance(base, Mapping) and base.get("name") in _BASES


def has_fitted_head(recipe: Mapping[str, Any]) -> bool:
    """Whether a recipe is of networks whose head is fitted to examples; the network need not be built to know."""
    return is_text_adapter(recipe) and recipe["base"].get("head") == "fitted"


def text_adapter(recipe: Mapping[str, Any], state: StateDict) -> tuple[LoRAAdapter, StateDict]:
    """Splits the weights of such a network into an adapter of the whole model, and the tensors of its head, if any.

    Args:
        recipe: Recipe of the network.
        state: Its `state_dict`.
    """
    assert is_text_adapter(recipe)
    names = [name.removesuffix(".lora_A") for name in state if name.endswith(".lora_A")]
    factors = {name: (state[f"{name}.lora_A"], state[f"{name}.lora_B"]) for name in names}
    alpha = recipe.get("alpha")
    scale = 1.0 if alpha is None else float(alpha) / int(recipe["rank"])
    path, is_causal = str(recipe["base"].get("path", PACKAGED)), recipe["base"]["name"] == _CAUSAL
    whole = {name: tensor for name, tensor in state.items() if not name.endswith((".lora_A", ".lora_B"))}
    head = {name: tensor for name, tensor in whole.items() if name.startswith(_CLASSIFIER)}
    adapter = LoRAAdapter(
        factors=factors,
        scales=dict.fromkeys(names, scale),
        whole={name: tensor for name, tensor in whole.items() if name not in head},
        base=causal_name(path) if is_causal else PACKAGED_NAME if path == PACKAGED else path.removeprefix(HUB),
        task_type="CAUSAL_LM" if is_causal else "FEATURE_EXTRACTION",
    )
    return adapter, head
