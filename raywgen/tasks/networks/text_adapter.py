"""Adapters of text models in the form of the PEFT library: of the recipe `lora` on `upper-layers` or `causal-lm`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from raywgen.tasks.networks.causal_lm import causal_name
from raywgen.tasks.networks.lora import LoRANetwork
from raywgen.tasks.networks.lora_forms import EVERY_SUFFIX
from raywgen.tasks.networks.registry import build_network
from raywgen.tasks.networks.text_models import PACKAGED, PACKAGED_NAME
from raywgen.trust import HUB
from raywgen.weights import StateDict
from raywgen.weights.adapters import LoRAAdapter

HEAD = "head.safetensors"
"""The file beside an adapter that holds its head: `classifier.weight`, `(C, H)`, and `classifier.bias`.

It reads the mean of the last hidden states over a sentence's tokens, divided by the root of its mean square. Adapters
of `BertForSequenceClassification` have theirs in the adapter's own file.
"""
_CLASSIFIER = "classifier."
_CAUSAL = "causal-lm"
_POOLER, _BERT = "pooler", "bert."
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
    factors = _factors(recipe, state)
    alpha = recipe.get("alpha")
    scale = 1.0 if alpha is None else float(alpha) / int(recipe["rank"])
    path, is_causal = str(recipe["base"].get("path", PACKAGED)), recipe["base"]["name"] == _CAUSAL
    whole = {name: tensor for name, tensor in state.items() if not name.endswith(EVERY_SUFFIX)}
    head = {name: tensor for name, tensor in whole.items() if name.startswith(_CLASSIFIER)}
    if recipe["base"].get("pooling") == _POOLER:
        return _classifier_adapter(factors, scale, whole, path), {}
    adapter = LoRAAdapter(
        factors=factors,
        scales=dict.fromkeys(factors, scale),
        whole={name: tensor for name, tensor in whole.items() if name not in head},
        base=causal_name(path) if is_causal else PACKAGED_NAME if path == PACKAGED else path.removeprefix(HUB),
        task_type="CAUSAL_LM" if is_causal else "FEATURE_EXTRACTION",
    )
    return adapter, head


def _classifier_adapter(
    factors: Mapping[str, tuple[Tensor, Tensor]], scale: float, whole: StateDict, path: str
) -> LoRAAdapter:
    """Returns an adapter of `BertForSequenceClassification`, which holds the encoder by a name of its own."""
    return LoRAAdapter(
        factors={f"{_BERT}{name}": pair for name, pair in factors.items()},
        scales=dict.fromkeys((f"{_BERT}{name}" for name in factors), scale),
        whole={name if name.startswith(_CLASSIFIER) else f"{_BERT}{name}": tensor for name, tensor in whole.items()},
        base=PACKAGED_NAME if path == PACKAGED else path.removeprefix(HUB),
        task_type="SEQ_CLS",
    )


def _factors(recipe: Mapping[str, Any], state: StateDict) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns both factors of each adapted module; frozen ones are those that the network is built with."""
    if recipe.get("form", "factors") != "factors":
        network = build_network(recipe)
        assert isinstance(network, LoRANetwork)
        network.load_state_dict(state)
        return {name: (a_RI.detach(), b_OR.detach()) for name, (a_RI, b_OR) in network.factors().items()}
    names = [name.removesuffix(".lora_A") for name in state if name.endswith(".lora_A")]
    return {name: (state[f"{name}.lora_A"], state[f"{name}.lora_B"]) for name in names}
