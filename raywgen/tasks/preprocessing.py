"""Finds how a task's samples were made, so that a new task's images are preprocessed alike.

Shape legend: S samples, C channels, H height, W width, F values of a sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from raywgen.tasks.image_tasks import input_statistics, pixel_statistics
from raywgen.tasks.images import normalise
from raywgen.trust import check_recipe, reading


@dataclass(frozen=True, slots=True, kw_only=True)
class InputForm:
    """The way pixels become samples.

    Attributes:
        size: Height and width of an image; None keeps the stored size.
        channels: 1 or 3; None keeps what is stored.
        mean: Mean of each channel, with pixels from 0 to 1.
        std: Standard deviation of each channel.
        encoder: The encoder, as `load_encoder` takes it; empty where samples are the pixels themselves.
    """

    size: int | None
    channels: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    encoder: str = ""

    def standardised(self, x_SCHW: Tensor) -> Tensor:
        """Returns pixels uint8 `(S, C, H, W)` as standardised samples float32 `(S, F)`."""
        return normalise(x_SCHW, mean=self.mean, std=self.std).flatten(1)

    def pixels(self, x_SF: Tensor) -> Tensor:
        """Returns the grey levels or colours from 0 to 1, `(S, C, P)`, of standardised samples with P pixels."""
        mean_C1, std_C1 = (x_SF.new_tensor(values).unsqueeze(1) for values in (self.mean, self.std))
        return x_SF.unflatten(1, (len(self.mean), -1)) * std_C1 + mean_C1

    def inverted(self, x_SF: Tensor) -> Tensor:
        """Returns standardised samples with light and dark exchanged."""
        mean_C1, std_C1 = (x_SF.new_tensor(values).unsqueeze(1) for values in (self.mean, self.std))
        return ((1 - self.pixels(x_SF) - mean_C1) / std_C1).flatten(1)


def input_form(recipe: Mapping[str, Any]) -> InputForm | None:
    """Reads the form from a task's recipe; None where its samples are no images."""
    inner = recipe.get("task", recipe)
    if inner.get("name") == "digits-subset":
        # Digits are grey levels from 0 to 1, 8x8; a user's own images are brought to that size.
        return InputForm(size=8, channels=1, mean=(0.0,), std=(1.0,))
    if inner.get("name") not in ("images", "episode", "feature-episode"):
        return None
    size, channels = inner.get("size"), inner.get("channels")
    if "mean" in inner and "std" in inner:
        mean, std = pixel_statistics(inner["mean"], inner["std"])
    else:
        with reading(getattr(recipe, "source", "")):
            check_recipe(recipe, "task")
        mean, std = input_statistics(inner["path"], size, channels)
    return InputForm(
        size=size,
        channels=channels,
        mean=tuple(mean.flatten().tolist()),
        std=tuple(std.flatten().tolist()),
        encoder=str(recipe.get("encoder", "")),
    )
