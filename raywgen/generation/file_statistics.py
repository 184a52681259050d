"""Estimates the statistics of batch normalisation of a network in a file anew, from unlabelled images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from raywgen.corpus import Corpus
from raywgen.corpus.chosen import networks_named
from raywgen.generation.stored_network import StoredNetwork
from raywgen.nn.batch_norm import StatisticsError, layers_with_statistics, reestimate_statistics
from raywgen.nn.devices import Device, resolved_device, say_device
from raywgen.tasks import build_network, network_name
from raywgen.tasks.networks import network_recipe
from raywgen.tasks.runnable import taken_inputs
from raywgen.tasks.unlabelled import UnlabelledInputs, open_unlabelled
from raywgen.tasks.user_data import ConditionError
from raywgen.trust import entry_point

OnProgress = Callable[[int, int], None]
"""Called with the number of images done and the number of all."""
# What varies by less than this share of its mean may do so by rounding in float32 alone.
_CONSTANT = 1e-5
_TRIED = 2
_MOST_NAMED = 3


@dataclass(kw_only=True)
class StatisticsConfig:
    """Settings of the estimation of a network's statistics.

    Attributes:
        weights: The network: a file of weights of any kind that `raywgen corpus build` reads, the
            `model.safetensors.index.json` of several, or a folder with one.
        network: Its architecture: a registry name such as `resnet101`, a recipe such as `{name: cifar-resnet, depth:
            20}`, the widths of a perceptron, `package.module:Class`, or with `corpus` a name that `raywgen corpus info`
            lists. Empty takes the name in the metadata of the file, where generation wrote it.
        corpus: Corpus whose architectures `network` may name.
        data: Images, of which labels are not read: a Parquet file, glob or `hf://` name, a folder of PNG or JPEG files
            (or of folders of them), an `.npy` file, or an `.npz` file with an array `x`.
        num: Images drawn from them at random, without replacement; 0 takes all.
        batch_size: Most images that are run at once, which bounds the memory. The statistics of one batch normalise its
            activations, so 32 or more are advisable.
        size: Height and width in pixels to resize images to; empty keeps the stored size.
        channels: 1 for grey, 3 for RGB; empty keeps what is stored.
        mean: Mean of each channel, pixels from 0 to 1, by which the network's images are standardised; by default that
            of the images that are drawn. ImageNet's is `[0.485,0.456,0.406]`.
        std: Standard deviation of each channel, likewise; ImageNet's is `[0.229,0.224,0.225]`.
        out: The `.safetensors` file to write, or for a network of several files the folder; by default a new one beside
            it, `NAME-statistics`. The network's own path replaces it.
        seed: Seed of the draw and of the order of the images.
        device: `cpu`, `cuda`, or `auto`: a GPU where there is one.
    """

    weights: str = ""
    network: Any = ""
    corpus: str = ""
    data: str = ""
    num: int = 1024
    batch_size: int = 64
    size: int | None = None
    channels: int | None = None
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    out: str = ""
    seed: int = 0
    device: Device = "auto"

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("data is empty: name images to estimate statistics from, for instance data=images.parquet")
        if self.num < 0 or self.num == 1 or self.batch_size < 2 or self.seed < 0:
            raise ValueError(
                f"num={self.num}, batch_size={self.batch_size}, seed={self.seed}: statistics need at least 2 images in "
                "all and in a batch (num=0 takes all), a seed is at least 0"
            )
        if (self.size is not None and self.size < 1) or self.channels not in (None, 1, 3):
            raise ValueError(f"size={self.size}, channels={self.channels}: give a positive size, and 1 or 3 channels")
        if len(self.mean) != len(self.std) or any(value <= 0 for value in self.std):
            raise ValueError(f"mean={self.mean}, std={self.std}: give as many of both, one a channel, and std above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reestimated:
    """Facts about the new statistics.

    Attributes:
        path: The file, or folder, that holds the network.
        network: Name of the architecture.
        num_layers: Layers of batch normalisation whose statistics are new.
        unused_layers: Names of those that did not run, and kept theirs.
        num_channels: Channels of all these layers.
        num_constant: Channels that were constant on all images; their variance is 0.
        num_unusable: Channels whose old mean or variance was not finite, or the variance negative.
        num_images: Images used.
        image_shape: Shape of an image as the network got it.
        mean: Mean by which pixels were standardised; empty where the inputs were no pixels.
        std: Standard deviation by which they were.
        mean_shift: Median over channels of the change of the mean, in new standard deviations.
        variance_ratio: Median over channels of the factor between the old and the new variance, at least 1.
        furthest: Layer whose means moved furthest, by the median over its channels.
        furthest_shift: That median.
    """

    path: str
    network: str
    num_layers: int
    unused_layers: tuple[str, ...]
    num_channels: int
    num_constant: int
    num_unusable: int
    num_images: int
    image_shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mean_shift: float
    variance_ratio: float
    furthest: str
    furthest_shift: float

    @property
    def notes(self) -> list[str]:
        """Sentences about what is unusual."""
        notes = []
        if self.num_constant:
            notes.append(f"{self.num_constant} channels were constant on all images, and have a variance of 0")
        if self.num_unusable:
            notes.append(f"{self.num_unusable} channels had statistics that were not finite, or a variance below 0")
        if self.unused_layers:
            names = ", ".join(self.unused_layers[:_MOST_NAMED])
            notes.append(f"{len(self.unused_layers)} layers did not run and keep their statistics: {names}")
        return notes


@entry_point
def estimate_file_statistics(
    config: StatisticsConfig, on_decoded: OnProgress | None = None, on_progress: OnProgress | None = None
) -> Reestimated:
    """Estimates statistics batch by batch and writes the network with them; all other tensors stay bit for bit.

    Memory holds the network twice and the activations of one batch, whatever the number of images. See
    `raywgen.nn.batch_norm.reestimate_statistics` for what is estimated.

    Args:
        config: Settings.
        on_decoded: Called with images decoded and images to decode, where they are not in the cache.
        on_progress: Called with images done and all images.

    Raises:
        ConfigError, TaskError: There is no such architecture, or the images cannot be read.
        WeightsError, UnsafeFileError: The file is damaged or does not fit the architecture, `out` exists or cannot be
            written, or its dtype cannot hold a value.
        OutError: `out` is a URI.
        ConditionError: The network does not run on the images.
        StatisticsError: The network has no batch normalisation, or a layer's activations are constant or not finite.
        DeviceError: A GPU is asked for, and there is none.
    """
    device = resolved_device(config.device)
    stored = StoredNetwork.at(config.weights)
    target = stored.target(config.out)
    recipe = _recipe(config, stored)
    name = network_name(recipe)
    module = build_network(recipe)
    if not layers_with_statistics(module):
        raise StatisticsError(f"network={name} has no batch normalisation with running statistics; nothing was written")
    stored_names = stored.load_into(module, name)
    inputs = open_unlabelled(
        config.data,
        num=config.num,
        size=config.size,
        channels=config.channels,
        seed=config.seed,
        on_progress=on_decoded,
    )
    if len(inputs) < _TRIED:
        raise ConditionError(f"{config.data} holds one image; statistics need at least 2, the more the better")
    mean, std = _standardisation(config, inputs)
    module, is_flat = _run_on_some(module, inputs, mean, std, name, config.data)
    say_device(f"{target}: runs {name}", config.device, device)
    batches = inputs.batches(config.batch_size, mean, std)
    new = reestimate_statistics(
        module.to(device),
        (batch.flatten(1) if is_flat else batch for batch in batches),
        None if on_progress is None else lambda done: on_progress(done, len(inputs)),
    )
    new = {name: value.cpu() for name, value in new.items()}
    facts = _facts(module.cpu(), new)
    stored.write(target, _by_stored_name(module, new, stored_names))
    return Reestimated(
        path=str(target),
        network=name,
        num_images=len(inputs),
        image_shape=tuple(inputs.stored.shape[1:]),
        mean=mean,
        std=std,
        **facts,
    )


def _recipe(config: StatisticsConfig, stored: StoredNetwork) -> dict[str, Any]:
    network = config.network or stored.network_name
    if not network:
        raise ConditionError(
            f"network is empty, and {config.weights} does not say its architecture; name it, for instance "
            "network=resnet101, network='{name: cifar-resnet, depth: 20}' or network=mynets:MyNet"
        )
    if not config.corpus or not isinstance(network, str):
        return network_recipe(network)
    facts = networks_named(Corpus.open(config.corpus), network)[0]
    if not facts.recipe:
        raise ConditionError(
            f"network={network}: {config.corpus} does not say how it is built; describe it by `raywgen corpus "
            "describe`, or give its recipe"
        )
    return facts.recipe


def _standardisation(config: StatisticsConfig, inputs: UnlabelledInputs) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if not inputs.has_pixels:
        if config.mean:
            raise ConditionError(
                f"{config.data} holds no uint8 images: leave out mean= and std=, and standardise it before"
            )
        return (), ()
    if config.mean and len(config.mean) != inputs.stored.shape[1]:
        raise ConditionError(
            f"images of {config.data} have {inputs.stored.shape[1]} channels, mean= and std= {len(config.mean)} "
            "values; give one of each for each channel, or convert image files by channels="
        )
    if config.mean:
        return tuple(config.mean), tuple(config.std)
    return inputs.pixel_statistics()


def _run_on_some(
    module: nn.Module, inputs: UnlabelledInputs, mean: tuple[float, ...], std: tuple[float, ...], name: str, data: str
) -> tuple[nn.Module, bool]:
    """Returns a copy of the network that ran on two images, and whether it takes them flat."""
    some = next(inputs.batches(_TRIED, mean, std))
    try:
        copied, taken = taken_inputs(module, [some, some.flatten(1)], 0, name)
    except ConditionError as error:
        raise ConditionError(f"{data}: {error}; size= and channels= convert images") from error
    return copied, taken.dim() == 2 and some.dim() > 2


def _facts(module: nn.Module, new: dict[str, Tensor]) -> dict[str, Any]:
    """Returns the fields of `Reestimated` that follow from old and new statistics.

    Raises:
        StatisticsError: All channels of a layer are constant.
    """
    old = module.state_dict()
    layers = [name for name in layers_with_statistics(module) if f"{name}.running_mean" in new]
    shifts, ratios, num_constant, num_unusable = {}, [], 0, 0
    for name in layers:
        means, variances = f"{name}.running_mean", f"{name}.running_var"
        mean_D, variance_D = new[means].double(), new[variances].double()
        old_mean_D, old_variance_D = old[means].double(), old[variances].double()
        constant_D = variance_D.sqrt() <= _CONSTANT * mean_D.abs()
        if bool(constant_D.all()):
            raise StatisticsError(
                f"all channels before layer '{name}' are constant on these images; look for zeros in the weights of "
                "the layers before it, and whether the images differ"
            )
        usable_D = old_mean_D.isfinite() & old_variance_D.isfinite() & (old_variance_D >= 0)
        num_constant += int(constant_D.sum())
        num_unusable += int((~usable_D).sum())
        shift_D = ((mean_D - old_mean_D).abs() / variance_D.sqrt())[usable_D & ~constant_D]
        shifts[name] = shift_D if len(shift_D) else torch.zeros(1, dtype=torch.float64)
        ratios.append((variance_D / old_variance_D).log().abs()[usable_D & ~constant_D & (old_variance_D > 0)])
    furthest = max(shifts, key=lambda name: float(shifts[name].median()))
    ratio = torch.cat(ratios)
    return {
        "num_layers": len(layers),
        "unused_layers": tuple(name for name in layers_with_statistics(module) if name not in shifts),
        "num_channels": sum(len(new[f"{name}.running_mean"]) for name in layers),
        "num_constant": num_constant,
        "num_unusable": num_unusable,
        "mean_shift": float(torch.cat(list(shifts.values())).median()),
        "variance_ratio": float(ratio.median().exp()) if len(ratio) else float("nan"),
        "furthest": furthest,
        "furthest_shift": float(shifts[furthest].median()),
    }


def _by_stored_name(module: nn.Module, new: dict[str, Tensor], stored_names: dict[str, str]) -> dict[str, Tensor]:
    """Returns new values by the names in the files; a layer that a module has under several names gets all of them."""
    buffers = module.state_dict(keep_vars=True)
    values = {id(buffers[name]): value for name, value in new.items()}
    return {stored: values[id(buffers[name])] for name, stored in stored_names.items() if id(buffers[name]) in values}
