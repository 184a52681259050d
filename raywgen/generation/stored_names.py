"""Modules of transformers and PEFT by the names that their files have, which corpora and generators are made of.

Since version 5 many models of transformers name their tensors otherwise than the files that they are loaded from and
saved to. A model of PEFT holds its base model, too, and its files the adapter alone.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from raywgen.tasks.user_data import ConditionError


class ByStoredNames(nn.Module):
    """A module whose `state_dict` has the names of its files; its tensors are those of the module itself.

    Args:
        module: The module.
        stored: The name in files of each tensor that these hold, by its name in the module.
    """

    def __init__(self, module: nn.Module, stored: Mapping[str, str]) -> None:
        super().__init__()
        # A list hides the module, whose tensors would otherwise be there twice.
        self._hidden, self._stored = [module], dict(stored)
        own = dict(module.state_dict(keep_vars=True))
        for name, other in stored.items():
            _put(self, other.split("."), own[name])
        self.train(module.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module on the tensors that this one has."""
        tensors = self.state_dict(keep_vars=True)
        own = {name: tensors[other] for name, other in self._stored.items()}
        return torch.func.functional_call(self._hidden[0], own, args, kwargs)

    def train(self, mode: bool = True) -> ByStoredNames:
        """Sets the mode of the module, too."""
        super().train(mode)
        self._hidden[0].train(mode)
        return self


def by_stored_names(module: nn.Module) -> nn.Module:
    """Returns a model of transformers or PEFT by the names of its files where they differ, else the module as it is.

    Of a model of PEFT that is the active adapter, beside which the base model stays as it is. A model of transformers
    whose files hold other tensors than the model, as where experts are stacked, stays as it is, too.

    Raises:
        ConditionError: The files of the adapter hold what is no tensor of the model.
    """
    peft = sys.modules.get("peft")
    if peft is not None and isinstance(module, peft.PeftModel):
        return _active_adapter(module, peft)
    loading, models = (sys.modules.get(f"transformers.{name}") for name in ("core_model_loading", "modeling_utils"))
    revert = getattr(loading, "revert_weight_conversion", None)
    if revert is None or models is None or not isinstance(module, models.PreTrainedModel):
        return module
    own = module.state_dict()
    names = {id(tensor): name for name, tensor in own.items()}
    stored = {names.get(id(tensor), ""): name for name, tensor in revert(module, dict(own)).items()}
    is_renamed = stored.keys() == own.keys() and any(name != other for name, other in stored.items())
    return ByStoredNames(module, stored) if is_renamed else module


def _active_adapter(module: Any, peft: Any) -> ByStoredNames:
    own = module.state_dict()
    names = {id(tensor): name for name, tensor in own.items()}
    held = peft.get_peft_model_state_dict(module, own, module.active_adapter, save_embedding_layers=False)
    if strange := [name for name, tensor in held.items() if id(tensor) not in names]:
        raise ConditionError(
            f"{type(module).__name__} has no tensor '{strange[0]}' of its adapter's files, as LoRA has; fill its base "
            "model, or give generated adapters to raywgen.inject"
        )
    return ByStoredNames(module, {names[id(tensor)]: name for name, tensor in held.items()})


def _put(module: nn.Module, path: list[str], tensor: torch.Tensor) -> None:
    """Registers a tensor under a dotted name, with an empty module for each part before the last."""
    for part in path[:-1]:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        inner = module._modules[part]
        assert inner is not None
        module = inner
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(path[-1], tensor)
    else:
        module.register_buffer(path[-1], tensor)
