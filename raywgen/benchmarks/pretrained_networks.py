"""Reads published networks from files, and measures their accuracy.

Shape letters beyond the legend in `raywgen.weights`: C channels, H height, W width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raywgen.benchmarks.trained import TrainingConfig
from raywgen.tasks.images import load_images, normalise
from raywgen.tasks.networks import build_network
from raywgen.weights import Layout, StateDict
from raywgen.weights.files import load_state_dict

_ENDINGS = (".safetensors", ".pt", ".pth", ".th")
_BLOCK = re.compile(r"layer1\.(\d+)\.conv1\.weight$")
_IMAGES_OF_A_PASS = 250


class PretrainedError(ValueError):
    """There are no networks at a path, or they belong to another family."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pretrained:
    """One published network.

    Attributes:
        file: Its file.
        depth: Depth of the ResNet.
        state: Its `state_dict`.
    """

    file: Path
    depth: int
    state: StateDict

    @property
    def name(self) -> str:
        """Name of its file, without the ending."""
        return self.file.stem

    @property
    def layout(self) -> Layout:
        """Layout of its `state_dict`."""
        return Layout.from_state_dict(self.state)

    @property
    def values_D(self) -> Tensor:
        """Flat vector of its weights."""
        return self.layout.flatten(self.state)

    @property
    def recipe(self) -> dict[str, Any]:
        """Recipe that `build_network` takes."""
        return {
            "name": "cifar-resnet",
            "depth": self.depth,
            "widths": [self.state[f"layer{stage}.0.conv1.weight"].shape[0] for stage in (1, 2, 3)],
            "num_classes": self.state["linear.weight"].shape[0],
            "in_channels": self.state["conv1.weight"].shape[1],
        }

    def module(self, state: Mapping[str, Tensor] | None = None) -> nn.Module:
        """Builds the network, with its own weights or other ones."""
        module = build_network(self.recipe)
        given = dict(self.state if state is None else state)
        # Old checkpoints have no counters of batches, and inference does not use them.
        counters = {name: value for name, value in module.state_dict().items() if name.endswith("num_batches_tracked")}
        module.load_state_dict({**counters, **given})
        return module.eval()


def find_networks(path: str) -> list[Pretrained]:
    """Reads the network of a file, or all of a folder in the order of their names.

    Raises:
        PretrainedError: There is none, or one is no ResNet for CIFAR with parameter-free shortcuts.
        WeightsError: A file is damaged.
    """
    root = Path(path)
    files = [root] if root.is_file() else sorted(file for file in root.glob("*") if file.suffix in _ENDINGS)
    if not files:
        raise PretrainedError(f"no networks at {path}; give a folder of, or one, {', '.join(_ENDINGS)} file")
    return [_read(file) for file in files]


def _read(file: Path) -> Pretrained:
    state = {name.removeprefix("module."): value for name, value in load_state_dict(file).items()}
    blocks = [int(found[1]) for name in state if (found := _BLOCK.match(name))]
    if not blocks or "linear.weight" not in state or "conv1.weight" not in state:
        raise PretrainedError(
            f"{file}: no CIFAR ResNet; its keys should be conv1, bn1, layer1.0.conv1 ... layer3, linear, and begin "
            f"with {', '.join(list(state)[:3])}"
        )
    network = Pretrained(file=file, depth=6 * (max(blocks) + 1) + 2, state=state)
    try:
        network.module()
    except (RuntimeError, KeyError) as error:
        raise PretrainedError(f"{file}: a ResNet of depth {network.depth} has other tensors: {error}") from error
    return network


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """The images as networks take them, and their classes."""

    x_SCHW: Tensor
    y_S: Tensor


def read_images(path: str, num: int, mean: Sequence[float], std: Sequence[float], seed: int = 0) -> Images:
    """Reads `num` images in their stored order, balanced over classes as far as possible; all of them for 0.

    Raises:
        TaskError: Data are missing or damaged.
    """
    data = load_images(path, channels=len(mean), limit=num or None, seed=seed)
    return Images(x_SCHW=normalise(data.x_SCHW, mean=mean, std=std), y_S=data.y_S)


@dataclass(kw_only=True)
class PretrainedConfig(TrainingConfig):
    """Settings of benchmarks of published networks: the networks, and their images.

    Attributes:
        dir: Folder of the networks, or one file.
        data: Training images; by default `cifar10-train.parquet` in `dir` or beside it.
        test_data: Test images; by default `cifar10-test.parquet` likewise.
        mean: Mean of the networks' input normalisation, one value per channel.
        std: Standard deviation of it, likewise.
        num_images: Test images; 0 for all.
        num_unlabelled: Training images for statistics of batch normalisation.
    """

    dir: str = ""
    data: str = ""
    test_data: str = ""
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    num_images: int = 0
    num_unlabelled: int = 500
    num_workers: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.dir:
            raise ValueError("give dir=PATH of a folder of networks")
        self.data = self.data or _beside(self.dir, "data", "cifar10-train.parquet")
        self.test_data = self.test_data or _beside(self.dir, "test_data", "cifar10-test.parquet")
        if self.num_unlabelled < 2:
            raise ValueError(f"num_unlabelled={self.num_unlabelled}: must be at least 2")

    def test_images(self, num: int) -> Images:
        """Reads test images; all of them for 0."""
        return read_images(self.test_data, num, self.mean, self.std)

    def train_images(self, num: int, seed: int) -> Images:
        """Reads training images, drawn by a seed."""
        return read_images(self.data, num, self.mean, self.std, seed=seed)


def _beside(folder: str, setting: str, name: str) -> str:
    """Finds a file of this name in a folder, beside it, or beside the folder of a file.

    Raises:
        ValueError: There is none; `setting` names what to give.
    """
    path = Path(folder)
    places = [path, path.parent, path.parent.parent]
    found = [place / name for place in places if (place / name).is_file()]
    if not found:
        raise ValueError(f"no {name} in {path} or beside it; give {setting}=PATH")
    return str(found[0])


@torch.inference_mode()
def correct(module: nn.Module, images: Images) -> Tensor:
    """Returns whether each image is classified correctly, bool `(S,)`."""
    parts = zip(images.x_SCHW.split(_IMAGES_OF_A_PASS), images.y_S.split(_IMAGES_OF_A_PASS), strict=True)
    return torch.cat([module(x_SCHW).argmax(dim=1) == y_S for x_SCHW, y_S in parts])


def percent(module: nn.Module, images: Images) -> float:
    """Returns the accuracy in percent."""
    return 100 * float(correct(module, images).double().mean())
