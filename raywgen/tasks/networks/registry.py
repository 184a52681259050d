"""Networks by registry name or import path."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn

from raywgen.names import nearest
from raywgen.nn.bounds import Bounded, TooLargeError
from raywgen.tasks.base import TaskError
from raywgen.tasks.networks.causal_lm import causal_lm
from raywgen.tasks.networks.cifar_resnet import CifarResNet
from raywgen.tasks.networks.cnn import PlainCNN
from raywgen.tasks.networks.conv4 import Conv4
from raywgen.tasks.networks.head import Head
from raywgen.tasks.networks.lora import LoRANetwork, load_base
from raywgen.tasks.networks.lora_forms import Form
from raywgen.tasks.networks.mlp import mlp
from raywgen.tasks.networks.next_word import next_word
from raywgen.tasks.networks.resnet import resnet50, resnet101
from raywgen.tasks.networks.tiny_cnn import tiny_cnn, tiny_cnn_rgb
from raywgen.tasks.networks.upper_layers import upper_layers
from raywgen.tasks.networks.vit import vit_b, vit_l, vit_s, vit_ti
from raywgen.trust import StoredRecipe, check_recipe, import_class, reading

INPUT_SHAPE = "input_shape"


def lora(
    base: Mapping[str, Any],
    rank: int,
    weights: str = "",
    targets: Sequence[str] = (),
    alpha: float | None = None,
    train_head: Sequence[str] = (),
    form: Form = "factors",
) -> LoRANetwork:
    """Builds adapters over a pretrained network of any recipe.

    Args:
        base: Recipe of the pretrained network, as `build_network` takes it.
        rank: Rank of the adapters.
        weights: File of the base's weights, as `load_base` takes it; empty for a base that is built with its weights.
        targets: Weights to adapt, as `LoRANetwork` takes them.
        alpha: Scale of the adapters, as `LoRANetwork` takes it.
        train_head: Parameters that are trained whole, as `LoRANetwork` takes them.
        form: What of the adapters is trained, as `LoRANetwork` takes it.

    Raises:
        TaskError: The base cannot be built or its weights cannot be loaded, or `LoRANetwork` refuses the rest.
    """
    if not isinstance(base, Mapping):
        raise TaskError(f"base={base}: give the recipe of a network, for instance {{name: cifar-resnet, depth: 20}}")
    module = build_network(base)
    if weights:
        load_base(module, weights, network_name(base))
    return LoRANetwork(module, rank, targets, alpha, train_head, form)


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "cnn": PlainCNN,
    "tiny-cnn": tiny_cnn,
    "tiny-cnn-rgb": tiny_cnn_rgb,
    "conv4": Conv4,
    "cifar-resnet": CifarResNet,
    "resnet50": resnet50,
    "resnet101": resnet101,
    "vit-ti": vit_ti,
    "vit-s": vit_s,
    "vit-b": vit_b,
    "vit-l": vit_l,
    "head": Head,
    "lora": lora,
    "upper-layers": upper_layers,
    "causal-lm": causal_lm,
    "next-word": next_word,
}
_PLAIN = re.compile(r"[\w.+-]*")


def build_network(recipe: Mapping[str, Any]) -> nn.Module:
    """Builds `{"name": NAME, **arguments}`; NAME is of the registry, or `package.module:Class`, an `nn.Module`.

    Tasks hand over flattened samples; `input_shape: [C, H, W]` in a recipe makes images of them first, for a module
    that does not do so itself. A class whose signature has an argument of that name gets it too.

    Under `torch.device("meta")` a network is built without memory for its values.

    Raises:
        TaskError: The name is unknown (the nearest is named), cannot be imported, or refuses its arguments; or the
            recipe came as data, and would take far more memory than is stored for it.
        UntrustedError: It names a package or an address that the user did not; see `raywgen.trust`.
    """
    name, arguments = _split(recipe)
    with reading(getattr(recipe, "source", "")):
        check_recipe(arguments, "network")
        build = _builder(name)
        arguments |= _shape_argument(recipe, build)
        try:
            with Bounded(recipe.num_stored) if isinstance(recipe, StoredRecipe) else nullcontext():
                module = build(**arguments)
        except TooLargeError as error:
            where = getattr(recipe, "source", "")
            raise TaskError(f"network '{network_name(recipe)}' of {where} is not built: {error}") from error
        except TypeError as error:
            known = ", ".join(_parameters(build)) or "no arguments"
            raise TaskError(f"network '{name}' does not take {arguments}: {error}; it takes {known}") from error
    if shape := recipe.get(INPUT_SHAPE):
        module.register_forward_pre_hook(partial(_reshape, tuple(shape)))
    return module


def network_recipe(network: str | Sequence[int] | Mapping[str, Any]) -> dict[str, Any]:
    """Returns the recipe for what a config may hold: a name, the widths of a perceptron, or a recipe.

    Raises:
        TaskError: A recipe has no name.
    """
    if isinstance(network, Mapping):
        if "name" not in network:
            raise TaskError(f"networks: {dict(network)} has no name; write for instance {{name: tiny-cnn}}")
        return dict(network)
    return {"name": network} if isinstance(network, str) else {"name": "mlp", "widths": list(network)}


def network_name(recipe: Mapping[str, Any]) -> str:
    """Returns a short name of the architecture, for instance `mlp-64-14-2` or `cifar-resnet-20-num_classes_100`.

    Arguments stand in the order of the builder's signature: bare as long as they fill it from its first parameter on
    without a gap, with their own name after that. So recipes of one builder have different names unless their
    arguments are equal, in whichever order they were written. An argument that is a recipe stands as its own name;
    a value that does not read as part of a name (a path, a pattern) is replaced by a hash at the end,
    `lora-mlp-64-8-2-rank_2-3f09c1d2`.

    Raises:
        TaskError: The recipe's name is unknown or cannot be imported.
        UntrustedError: It names a package that the user did not.
    """
    name, arguments = _split(recipe)
    with reading(getattr(recipe, "source", "")):
        build = _builder(name)
    order = _parameters(build)
    arguments |= _shape_argument(recipe, build)
    parts, is_bare, is_whole = [name.rpartition(":")[2]], True, True
    for place, key in enumerate(sorted(arguments, key=lambda key: (key not in order, order.get(key, 0), key))):
        value = arguments[key]
        text, is_simple = _name_part(value), not isinstance(value, list | tuple | Mapping)
        is_bare = is_bare and order.get(key) == place
        if text is not None:
            parts.append(text if is_bare else f"{key}_{text}")
        # A bare value after a list would read as one more item of it.
        is_bare = is_bare and is_simple and text is not None
        is_whole = is_whole and text is not None and not isinstance(value, Mapping)
    return "-".join(parts if is_whole else [*parts, _digest(arguments)])


def _name_part(value: Any) -> str | None:
    """Returns a value as part of a name; None where it does not read as one."""
    if isinstance(value, Mapping):
        return network_name(value) if "name" in value else None
    if isinstance(value, list | tuple):
        texts = [text for text in map(_name_part, value) if text is not None]
        return "-".join(texts) if len(texts) == len(value) else None
    return str(value) if _PLAIN.fullmatch(str(value)) else None


def _digest(arguments: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(arguments, sort_keys=True, default=str).encode()).hexdigest()[:8]


def _reshape(shape: tuple[int, ...], _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x_SF, *rest = inputs
    return x_SF.reshape(len(x_SF), *shape), *rest


def _split(recipe: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    arguments = {key: value for key, value in recipe.items() if key not in ("name", INPUT_SHAPE)}
    return str(recipe.get("name", "")), arguments


def _shape_argument(recipe: Mapping[str, Any], build: Callable[..., nn.Module]) -> dict[str, Any]:
    """Returns `input_shape` as an argument where the builder itself has one of that name."""
    return {INPUT_SHAPE: recipe[INPUT_SHAPE]} if INPUT_SHAPE in recipe and INPUT_SHAPE in _parameters(build) else {}


def _builder(name: str) -> Callable[..., nn.Module]:
    if ":" in name:
        return _import(name)
    if name not in NETWORKS:
        near = nearest(name, NETWORKS)
        raise TaskError(f"unknown network '{name}'; did you mean '{near}'? (or give package.module:Class)")
    return NETWORKS[name]


def _import(path: str) -> Callable[..., nn.Module]:
    try:
        return import_class(path, nn.Module, "network")
    except (ImportError, TypeError) as error:
        raise TaskError(f"cannot import network '{path}': {error}; give a class that is an nn.Module") from error


def _parameters(build: Callable[..., nn.Module]) -> dict[str, int]:
    """Returns the index of each parameter in the builder's signature; empty where it has no signature."""
    try:
        return {name: place for place, name in enumerate(inspect.signature(build).parameters)}
    except (TypeError, ValueError):
        return {}
