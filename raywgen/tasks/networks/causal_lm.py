"""Causal language models of transformers as networks: with their weights, or by the sizes of their matrices alone.

Names of tensors are those of transformers, so adapters of them are adapters that the PEFT library loads.

Shape legend: S texts, T tokens, V words of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from raywgen.tasks.base import TaskError
from raywgen.tasks.networks.text_models import hub_name, load_causal_model, transformers_module
from raywgen.trust import HUB

_QWEN_7B = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
_LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
_GROUPED_8B = _LLAMA_7B | {"intermediate_size": 14336, "num_key_value_heads": 8}
SIZES: dict[str, tuple[str, str, dict[str, int]]] = {
    "llama-2-7b": ("meta-llama/Llama-2-7b-hf", "llama", _LLAMA_7B | {"vocab_size": 32_000}),
    "llama-3-8b": ("meta-llama/Meta-Llama-3-8B", "llama", _GROUPED_8B | {"vocab_size": 128_256}),
    "mistral-7b": ("mistralai/Mistral-7B-v0.1", "mistral", _GROUPED_8B | {"vocab_size": 32_000}),
    "qwen2.5-7b": ("Qwen/Qwen2.5-7B", "qwen2", _QWEN_7B | {"num_key_value_heads": 4, "vocab_size": 152_064}),
}
"""Models that are known by their sizes: name on the hub, kind, and the settings that decide their matrices."""


class CausalLM(nn.Module):
    """A causal language model that says which word comes next.

    Args:
        model: A model of transformers as `AutoModelForCausalLM` loads it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        # In a tuple it is not registered: its parts are, under the names that they have in the model.
        self._model = (model,)
        for name, part in model.named_children():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits `(S, V)` of the word after texts `(S, T)` of token numbers."""
        (model,) = self._model
        return model(input_ids=x.long()).logits[:, -1]


def causal_lm(path: str) -> CausalLM:
    """Builds a causal language model.

    Args:
        path: Folder of the model in the form of the hub, or `hf:NAME`; under `torch.device("meta")` also one of
            `SIZES`, which needs no file.

    Raises:
        TaskError: The model is not there, or is known by its sizes alone where values are needed.
    """
    if path not in SIZES:
        return CausalLM(load_causal_model(path))
    if torch.get_default_device().type != "meta":
        raise TaskError(
            f"base {path} is known by its sizes alone, for `raywgen plan`; to train, give the folder of the model or "
            f"{HUB}{SIZES[path][0]}"
        )
    _, kind, sizes = SIZES[path]
    transformers: Any = transformers_module()
    config = transformers.AutoConfig.for_model(kind, **sizes, tie_word_embeddings=False)
    return CausalLM(transformers.AutoModelForCausalLM.from_config(config))


def causal_name(path: str) -> str:
    """Returns the name by which users of an adapter load its base."""
    return SIZES[path][0] if path in SIZES else hub_name(path)
