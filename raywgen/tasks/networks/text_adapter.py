"""Adapters of text models in the form of the PEFT library: of `lora` on text models."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from torch import Tensor

from raywgen.tasks.networks.causal_lm import causal_name
from raywgen.tasks.networks.lora import LoRANetwork
from raywgen.tasks.networks.lora_forms import EVERY_SUFFIX, SUFFIXES, Form, factors
from raywgen.tasks.networks.registry import build_network
from raywgen.tasks.networks.text_models import PACKAGED, hub_name
from raywgen.weights import StateDict
from raywgen.weights.adapters import LoRAAdapter

HEAD = "head.safetensors"
"""The file beside an adapter that holds its head: `classifier.weight`, `(C, H)`, and `classifier.bias`.

It reads the mean of the last hidden states over a sentence's tokens, divided by the root of its mean square. Adapters
of `BertForSequenceClassification` have theirs in the adapter's own file.
"""
_CLASSIFIER = "classifier."
_CAUSAL = ("causal-lm", "next-word")
_POOLER, _BERT = "pooler", "bert."
_BASES = ("upper-layers", *_CAUSAL)


def is_text_adapter(recipe: Mapping[str, Any]) -> bool:
    """Whether a recipe is of adapters of the upper layers of a text encoder, or of a causal language model."""
    base = recipe.get("base")
    return recipe.get("name") == "lora" and isinstance(base, Mapping) and base.get("name") in _BASES


def has_fitted_head(recipe: Mapping[str, Any]) -> bool:
    """Whether a recipe is of networks whose head is fitted to examples; the network need not be built to know."""
    return is_text_adapter(recipe) and recipe["base"].get("head") == "fitted"


class TextAdapters:
    """Splits the weights of networks of one recipe into adapters of the whole model and the tensors of their heads.

    A network of the recipe is built where frozen factors are needed, once for all.

    Args:
        recipe: Recipe of the networks.
    """

    def __init__(self, recipe: Mapping[str, Any]) -> None:
        assert is_text_adapter(recipe)
        self._recipe = recipe
        self._form: Form = recipe.get("form", "factors")

    def split(self, state: StateDict) -> tuple[LoRAAdapter, StateDict]:
        """Returns the adapter and the head, if any, of a network with this `state_dict`."""
        pairs, base = self._factors(state), self._recipe["base"]
        alpha = self._recipe.get("alpha")
        scale = 1.0 if alpha is None else float(alpha) / int(self._recipe["rank"])
        path, is_causal = str(base.get("path", PACKAGED)), base["name"] in _CAUSAL
        whole = {name: tensor for name, tensor in state.items() if not name.endswith(EVERY_SUFFIX)}
        head = {name: tensor for name, tensor in whole.items() if name.startswith(_CLASSIFIER)}
        if base.get("pooling") == _POOLER:
            return _classifier_adapter(pairs, scale, whole, hub_name(path)), {}
        adapter = LoRAAdapter(
            factors=pairs,
            scales=dict.fromkeys(pairs, scale),
            whole={name: tensor for name, tensor in whole.items() if name not in head},
            base=causal_name(path) if is_causal else hub_name(path),
            task_type="CAUSAL_LM" if is_causal else "FEATURE_EXTRACTION",
        )
        return adapter, head

    def _factors(self, state: StateDict) -> dict[str, tuple[Tensor, Tensor]]:
        """Returns both factors of each adapted module."""
        first, *_ = suffixes = SUFFIXES[self._form]
        names = [name.removesuffix(f".{first}") for name in state if name.endswith(f".{first}")]
        trained = {name: tuple(state[f"{name}.{suffix}"] for suffix in suffixes) for name in names}
        return {name: factors(self._form, parts, self._fixed.get(name, ())) for name, parts in trained.items()}

    @cached_property
    def _fixed(self) -> dict[str, tuple[Tensor, ...]]:
        """The frozen factors of each adapted module, if any: those that a network is built with."""
        if self._form == "factors":
            return {}
        network = build_network(self._recipe)
        assert isinstance(network, LoRANetwork)
        return network.frozen_factors()


def text_adapter(recipe: Mapping[str, Any], state: StateDict) -> tuple[LoRAAdapter, StateDict]:
    """Splits the weights of a single network, as `TextAdapters` does those of many.

    Args:
        recipe: Recipe of the network.
        state: Its `state_dict`.
    """
    return TextAdapters(recipe).split(state)


def _classifier_adapter(
    pairs: Mapping[str, tuple[Tensor, Tensor]], scale: float, whole: StateDict, base: str
) -> LoRAAdapter:
    """Returns an adapter of `BertForSequenceClassification`, which holds the encoder by a name of its own."""
    return LoRAAdapter(
        factors={f"{_BERT}{name}": pair for name, pair in pairs.items()},
        scales=dict.fromkeys((f"{_BERT}{name}" for name in pairs), scale),
        whole={name if name.startswith(_CLASSIFIER) else f"{_BERT}{name}": tensor for name, tensor in whole.items()},
        base=base,
        task_type="SEQ_CLS",
    )
