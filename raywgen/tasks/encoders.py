"""Frozen encoders, which turn inputs into features: from a folder, an import path or a Hugging Face model.

Inputs are those of tasks on images: pixels standardised by the statistics of the data that they come from.

Shape legend: S samples, F values of a sample, E features, C channels, H height, W width, T tokens.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import safetensors.torch
import torch
from pyarrow import fs
from safetensors import SafetensorError
from torch import Tensor, nn

from raywgen.extras import hub_needed
from raywgen.nn.batch_norm import layers_with_statistics, reestimate_statistics
from raywgen.sealed import sealed_json, unseal
from raywgen.storage import Storage, StorageError
from raywgen.tasks.base import TaskError
from raywgen.tasks.networks import build_network
from raywgen.tasks.networks.images import as_images
from raywgen.tasks.text_datasets import find_files
from raywgen.trust import HUB, StoredRecipe, check_address
from raywgen.weights.safetensors_writer import safetensors_bytes

WEIGHTS, CARD = "encoder.safetensors", "encoder.json"
_IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:\w+")
_SEED = 0
_SMALLEST_RATIO = 1e-12


class EncoderError(TaskError):
    """An encoder that cannot be used as asked; the message names it and the remedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderCard:
    """The facts that a folder holds about its encoder.

    Attributes:
        network: Recipe of the network without a head, as `build_network` takes it.
        size: Height and width of its images.
        channels: Channels of its images.
        mean: Mean of each channel of the data it was trained on, with pixels from 0 to 1.
        std: Standard deviation of each; other data is standardised by its own.
        facts: Further facts: data, classes, seed, accuracy and the like.
        centre: Mean of each feature over the training classes, which is subtracted from features; empty for none.
        spread: Root mean square of the features about it; features are divided by it.
    """

    network: dict[str, Any]
    size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    facts: dict[str, Any] = field(default_factory=dict)
    centre: tuple[float, ...] = ()
    spread: float = 1.0


class FrozenEncoder(nn.Module):
    """Maps inputs `(S, F)` to features `(S, E)`, always in eval mode and without gradients.

    Args:
        module: Gives `(S, E)`. It is handed `(S, F)`, or `(S, *module.input_shape)` where it says that.
        name: The encoder as `load_encoder` was given it, for messages.
        identity: Everything beside the module's values that decides the features, for the fingerprint.
        takes: The inputs that it takes in words, for messages.
        centre: E values that are subtracted from the features.
        spread: Number that the features are divided by.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        name: str,
        identity: str,
        takes: str = "",
        centre: tuple[float, ...] = (),
        spread: float = 1.0,
    ) -> None:
        super().__init__()
        self.register_buffer("centre_E", torch.tensor(centre or 0.0), persistent=False)
        self._spread = spread
        # Convolutions are faster in channels-last on a CPU, and other modules do not notice.
        self.module = module.to(memory_format=torch.channels_last).eval().requires_grad_(False)  # pyright: ignore[reportCallIssue]
        self.name, self._identity, self._takes = name, identity, takes
        self._shape: tuple[int, ...] = tuple(getattr(module, "input_shape", ()))
        self.training = False

    centre_E: Tensor

    @cached_property
    def fingerprint(self) -> str:
        """Returns 32 hex digits that change with the encoder's values and with what it is."""
        digest = hashlib.sha256(self._identity.encode())
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:32]

    def train(self, mode: bool = True) -> FrozenEncoder:
        """Does nothing: the encoder stays in eval mode."""
        return self

    def forward(self, x_SF: Tensor) -> Tensor:
        """Returns features `(S, E)`, float32.

        Raises:
            EncoderError: The inputs have another size, or the features are not `(S, E)` or not finite.
        """
        features_SE = self._checked(self._run(self.module, x_SF), len(x_SF))
        return (features_SE - self.centre_E) / self._spread

    @property
    def has_blocks(self) -> bool:
        """Whether its module has a method `last_blocks`."""
        return callable(getattr(self.module, "last_blocks", None))

    @property
    def has_statistics(self) -> bool:
        """Whether its module has layers of batch normalisation."""
        return bool(layers_with_statistics(self.module))

    def last_blocks(self, x_SF: Tensor) -> list[Tensor]:
        """Returns what the module's method `last_blocks` does: features `(S, E)` of several layers, the last one last.

        Raises:
            EncoderError: As `forward`.
        """
        assert self.has_blocks, "callers ask first"
        return [self._checked(block, len(x_SF)) for block in self._run(self.module.last_blocks, x_SF)]  # pyright: ignore[reportArgumentType]

    @torch.no_grad()
    def normalised_by(self, x_SF: Tensor) -> FrozenEncoder:
        """Returns a copy whose batch normalisation has the statistics of these inputs.

        Raises:
            EncoderError: As `forward`.
        """
        return self.with_statistics(self._run(lambda x: reestimate_statistics(self.module, x), x_SF))

    def with_statistics(self, statistics: Mapping[str, Tensor]) -> FrozenEncoder:
        """Returns a copy whose batch normalisation has these statistics, entries of the module's `state_dict`."""
        other = copy.deepcopy(self)
        other.module.load_state_dict({**self.module.state_dict(), **statistics})
        other.__dict__.pop("fingerprint", None)
        return other

    def shift_of(self, other: FrozenEncoder) -> float:
        """Says how far another's statistics are from its own: the mean over channels of KL(N(other) || N(own)), nats.

        It is of the first layer of batch normalisation, whose statistics many pixels give even where there are few
        images.

        Args:
            other: What `normalised_by` or `with_statistics` returned.
        """
        own, new = (next(iter(layers_with_statistics(one.module).values())) for one in (self, other))
        assert own.running_mean is not None
        assert own.running_var is not None
        assert new.running_mean is not None
        assert new.running_var is not None
        ratio_D = new.running_var / own.running_var
        distance_D = (new.running_mean - own.running_mean).square() / own.running_var
        return float((ratio_D + distance_D - 1 - ratio_D.clamp(min=_SMALLEST_RATIO).log()).mean() / 2)

    def _run(self, call: Callable[[Tensor], Any], x_SF: Tensor) -> Any:
        try:
            with torch.no_grad():
                return call(x_SF.reshape(len(x_SF), *self._shape) if self._shape else x_SF)
        except (RuntimeError, ValueError) as error:
            raise EncoderError(
                f"encoder '{self.name}' does not take samples of {x_SF[0].numel()} values ({error})"
                f"{f'; it takes {self._takes}' if self._takes else ''}; give size and channels that suit it"
            ) from error

    def _checked(self, features_SE: Any, num_samples: int) -> Tensor:
        shape = list(getattr(features_SE, "shape", [type(features_SE).__name__]))
        if len(shape) != 2 or shape[0] != num_samples:
            raise EncoderError(
                f"encoder '{self.name}' makes {shape} of {num_samples} samples; give a module whose output is "
                "(samples, features)"
            )
        if not features_SE.isfinite().all():
            raise EncoderError(
                f"encoder '{self.name}' gives NaN or infinite features; look at the encoder and the data"
            )
        return features_SE.float()


def load_encoder(name: str) -> FrozenEncoder:
    """Loads a frozen encoder.

    Args:
        name: A folder or URI that `save_encoder` wrote; `package.module:Class`, an `nn.Module` that is built without
            arguments (values that it draws are drawn by a fixed seed) and may say `input_shape = (C, H, W)`; or
            `hf:NAME_OR_PATH`, a vision model of the hub or in a folder of its own, whose images are resized to what it
            takes, and whose pooled output, else the mean of its last hidden state, are the features.

    Raises:
        EncoderError: There is no such encoder, or it is damaged.
        UntrustedError: It names a package or an address that the user did not; see `raywgen.trust`.
    """
    kind = encoder_kind(name)
    if kind != "import":
        check_address(name, "encoder")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        return _LOAD[kind](name)


def encoder_kind(name: str) -> str:
    """Returns how `load_encoder` reads a name: `hub`, `import` or `folder`.

    Raises:
        EncoderError: The name is empty.
    """
    if not name:
        raise EncoderError("encoder is empty; give a folder, package.module:Class or hf:NAME")
    if name.startswith(HUB) and not name.startswith("hf://"):
        return "hub"
    return "import" if _IMPORT_PATH.fullmatch(name) else "folder"


def save_encoder(state_dict: Mapping[str, Tensor], card: EncoderCard, folder: str) -> None:
    """Writes a folder for `load_encoder`, and replaces one that is there.

    Args:
        state_dict: Values of the network that `card.network` builds.
        card: The facts of the encoder; they are written last, so that half a folder is not taken for a whole one.
        folder: A local path or URI.

    Raises:
        EncoderError: It cannot be written.
    """
    content = safetensors_bytes({name: tensor.detach().contiguous() for name, tensor in state_dict.items()}, {})
    sealed = sealed_json(asdict(card) | {"sha256": hashlib.sha256(content).hexdigest()}, indent=1)
    try:
        storage = Storage.at(folder)
        storage.delete(CARD)
        for name, written in ((WEIGHTS, content), (CARD, sealed.encode())):
            storage.write(name, written)
    except (OSError, StorageError) as error:
        raise EncoderError(
            f"cannot write the encoder to {folder} ({error}); free some space or name another"
        ) from error


def copy_encoder(name: str, folder: str) -> None:
    """Writes the encoder of one folder into another; errors as `load_encoder` and `save_encoder`."""
    save_encoder(load_encoder(name).module.state_dict(), read_card(name), folder)


def read_card(folder: str) -> EncoderCard:
    """Reads the facts that a folder holds about its encoder.

    Raises:
        EncoderError: There is no such folder, or its card is damaged.
    """
    return _card(folder)[0]


def _card(folder: str) -> tuple[EncoderCard, str]:
    """Reads the card of a folder and the checksum of its weights."""
    content = _read(folder, CARD)
    try:
        # Older versions wrote cards without a checksum.
        stored = unseal(content, is_required=False)
        card = EncoderCard(**{item.name: stored[item.name] for item in fields(EncoderCard)})
        card = replace(card, centre=tuple(card.centre))
        return card, str(stored["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise EncoderError(f"{folder}/{CARD} is damaged ({error!r}); train or copy the encoder again") from error


def _read(folder: str, name: str) -> bytes:
    try:
        filesystem, infos = find_files(folder)
        path = f"{infos[0].path}/{name}"
        if filesystem.get_file_info(path).type == fs.FileType.Unknown:
            raise TaskError(f"{path} is a pipe, socket or device")
        with filesystem.open_input_stream(path) as file:
            return file.read()
    except (TaskError, OSError) as error:
        raise EncoderError(
            f"there is no encoder in '{folder}' ({error}); give a folder with {WEIGHTS} and {CARD}, as `raywgen "
            "encoder train` writes it, package.module:Class or hf:NAME"
        ) from error


def _load_folder(name: str) -> FrozenEncoder:
    card, expected = _card(name)
    content = _read(name, WEIGHTS)
    if hashlib.sha256(content).hexdigest() != expected:
        raise EncoderError(f"{name}/{WEIGHTS} is damaged: its sum is not that of {CARD}; train or copy it again")
    module = build_network(StoredRecipe.of(card.network, f"{name}/{CARD}", len(content)))
    try:
        module.load_state_dict(safetensors.torch.load(content))
    except (SafetensorError, RuntimeError) as error:
        raise EncoderError(f"{name}: {WEIGHTS} does not fit the network of {CARD} ({error}); train it again") from error
    takes = f"images of {card.size} x {card.size} pixels and {card.channels} channels"
    identity = json.dumps([card.network, card.centre, card.spread], sort_keys=True)
    return FrozenEncoder(module, name=name, identity=identity, takes=takes, centre=card.centre, spread=card.spread)


def _load_import(name: str) -> FrozenEncoder:
    try:
        module = build_network({"name": name})
    except TaskError as error:
        raise EncoderError(f"encoder '{name}': {error}") from error
    try:
        source = inspect.getsource(type(module))
    except (OSError, TypeError):
        source = ""
    return FrozenEncoder(module, name=name, identity=f"{name}\n{source}")


def _load_hub(name: str) -> FrozenEncoder:
    try:
        from transformers import AutoModel
    except ImportError as error:
        raise EncoderError(hub_needed(f"encoder '{name}'", "transformers")) from error
    model_name = name.removeprefix(HUB)
    try:
        # Safetensors alone: the older files of the hub are pickles. Code that lies beside a model is never run.
        model, info = AutoModel.from_pretrained(
            model_name, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # The hub's client raises errors of several libraries.
        raise EncoderError(f"encoder '{name}' cannot be loaded ({error}); check the name and the connection") from error
    vision = getattr(model, "vision_model", model)
    if getattr(vision, "main_input_name", "pixel_values") != "pixel_values":
        raise EncoderError(f"encoder '{name}' takes {vision.main_input_name}, not images; give a vision model")
    missing = sorted(info["missing_keys"])
    if values := [key for key in missing if "pooler" not in key]:
        raise EncoderError(
            f"encoder '{name}': the model's file has no values for {', '.join(values[:3])}; give another"
        )
    module = _HubImages(vision.float(), pooled=not missing)
    return FrozenEncoder(module, name=name, identity=vision.config.to_json_string(), takes="square images")


class _HubImages(nn.Module):
    """A vision model of `transformers` on flattened images.

    Args:
        model: The model, which takes `pixel_values` `(S, C, H, W)`.
        pooled: Whether its pooled output is used; a pooler without trained values is noise.
    """

    def __init__(self, model: Any, *, pooled: bool) -> None:
        super().__init__()
        self.model, self._pooled = model, pooled
        size = getattr(model.config, "image_size", None)
        self._size = tuple(size) if isinstance(size, list | tuple) else size and (size, size)
        self._channels = int(getattr(model.config, "num_channels", 3))

    def forward(self, x_SF: Tensor) -> Tensor:
        # No number is a square and thrice a square, so the number of values tells the channels.
        is_grey = math.isqrt(x_SF.shape[1]) ** 2 == x_SF.shape[1]
        images_SCHW = as_images(x_SF, 1 if is_grey else 3)
        if is_grey:
            images_SCHW = images_SCHW.expand(-1, self._channels, -1, -1)
        if self._size and images_SCHW.shape[2:] != self._size:
            images_SCHW = nn.functional.interpolate(images_SCHW, size=self._size, mode="bilinear", antialias=True)
        outputs = self.model(pixel_values=images_SCHW)
        if self._pooled and getattr(outputs, "pooler_output", None) is not None:
            return outputs.pooler_output.flatten(1)
        hidden = outputs.last_hidden_state  # (S, T, E), or (S, E, H, W) of a convolutional network.
        return hidden.mean(dim=1) if hidden.dim() == 3 else hidden.flatten(2).mean(dim=2)


_LOAD = {"folder": _load_folder, "import": _load_import, "hub": _load_hub}
