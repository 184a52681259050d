"""Tasks on labelled images: all classes or some, seen in a domain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from raywgen.tasks.base import Inputs, Task, TaskError
from raywgen.tasks.domains import apply_domain
from raywgen.tasks.episodes import class_groups, split_classes
from raywgen.tasks.image_classes import class_rows
from raywgen.tasks.images import ImageData, channel_statistics, load_digits_images, load_images
from raywgen.tasks.subsets import balanced_rows

DIGITS = "digits"
_TEST_SHARE = 0.2
_BLOCK = 4096
_SPLIT_SEED = 0


def image_task(
    path: str,
    test_path: str = "",
    classes: Sequence[int] | None = None,
    domain: str = "plain",
    size: int | None = None,
    channels: int | None = None,
    limit: int | None = None,
    test_limit: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Task:
    """Builds the task "Which of these classes does the image show?".

    Args:
        path: Path of the images, as `load_images` takes it, or `digits` for scikit-learn's.
        test_path: Images that nothing is trained on; without it a fifth of each class is held out.
        classes: The task's classes; all by default.
        domain: Domain in which images are seen, as `apply_domain` takes it.
        size: Height and width that images are scaled to.
        channels: 1 or 3; as they are stored by default.
        limit: Number of training images, equally many of each class.
        test_limit: Number of test images, equally many of each class.
        mean: Mean of each channel, with pixels from 0 to 1, as the networks to be judged expect it; by default that of
            the training images.
        std: Standard deviation of each channel, likewise.

    Raises:
        TaskError: Data, classes or domain are not there, or `mean` and `std` are not of one number a channel each.
    """
    data = _split(path, test_path, size, channels, limit, test_limit)
    statistics = (tuple(mean), tuple(std)) if mean is not None and std is not None else None
    shared = _split_inputs(path, test_path, size, channels, limit, test_limit, domain, statistics)
    (train_inputs, train_y_S), (test_inputs, test_y_S) = (
        _of_classes(inputs, images, classes) for inputs, images in zip(shared, data, strict=True)
    )
    every = data[0].class_names
    names = every if classes is None else tuple(every[number] for number in classes)
    choices = {"classes": list(classes)} if classes is not None else {}
    options = {"test_path": test_path, "domain": domain, "size": size, "channels": channels, "limit": limit}
    choices |= {} if statistics is None else {"mean": list(statistics[0]), "std": list(statistics[1])}
    recipe = {"name": "images", "path": path, **options, "test_limit": test_limit, **choices}
    parts = [data[0].name, domain, "-".join(map(str, classes)) if classes is not None else "all"]
    seen = "" if domain == "plain" else f", seen under {domain}"
    return Task(
        id="/".join(parts),
        instruction=f"Which of {', '.join(names)} is in the image{seen}?",
        recipe={key: value for key, value in recipe.items() if value not in (None, "")},
        train_inputs=train_inputs,
        train_y_S=train_y_S,
        test_inputs=test_inputs,
        test_y_S=test_y_S,
        num_classes=len(names),
    )


def num_classes(path: str) -> int:
    """Counts the classes of a data set."""
    return len(images_of(path, None, None, None).class_names)


def classes_of(data: ImageData, split: str, group: str, seed: int) -> tuple[int, ...]:
    """Returns the classes that episodes of a split are drawn from.

    Args:
        data: All classes.
        split: `train`, `validation` or `test`: classes of the three are disjoint; or `all`.
        group: Column whose groups stay in one split; empty to split class by class.
        seed: Seed of the split.

    Raises:
        TaskError: There is no such split or column, or there are too few classes.
    """
    if split == "all":
        return tuple(range(len(data.class_names)))
    classes = split_classes(class_groups(data, group) if group else data.class_names, seed=seed)
    if split not in classes:
        raise TaskError(f"split={split}: give one of {', '.join(classes)} or all")
    return classes[split]


@lru_cache(maxsize=16)
def images_of(path: str, size: int | None, channels: int | None, limit: int | None) -> ImageData:
    """Loads images of `digits` or of a path that `load_images` takes, once per process."""
    if path != DIGITS:
        return load_images(path, size=size, channels=channels, limit=limit)
    data = load_digits_images()
    if channels not in (None, 1):
        raise TaskError(f"path=digits: images are grey, not channels={channels}; leave it out")
    if size not in (None, data.x_SCHW.shape[-1]):
        large_SCHW = nn.functional.interpolate(data.x_SCHW.float(), size=(size, size), mode="bilinear", antialias=True)
        data = replace(data, x_SCHW=large_SCHW.round().clamp(0, 255).to(torch.uint8))
    return data if limit is None else _rows(data, torch.from_numpy(balanced_rows(data.y_S.numpy(), limit, _SPLIT_SEED)))


@lru_cache(maxsize=16)
def images_in(path: str, domain: str, size: int | None, channels: int | None) -> ImageData:
    """Returns all images of a data set as they look in a domain, once per process; rounded to uint8."""
    data = images_of(path, size, channels, None)
    return replace(data, x_SCHW=in_domain(data.x_SCHW, domain)) if domain != "plain" else data


def in_domain(x_SCHW: Tensor, domain: str) -> Tensor:
    """Returns pixels, uint8, as they look in a domain, rounded to uint8.

    Raises:
        TaskError: There is no such domain.
    """
    if domain == "plain":
        return x_SCHW
    blocks = [apply_domain(x.float() / 255, domain) for x in x_SCHW.split(_BLOCK)]
    return torch.cat([block.mul_(255).round_().to(torch.uint8) for block in blocks])


@lru_cache(maxsize=16)
def _split(
    path: str, test_path: str, size: int | None, channels: int | None, limit: int | None, test_limit: int | None
) -> tuple[ImageData, ImageData]:
    if test_path:
        return images_of(path, size, channels, limit), images_of(test_path, size, channels, test_limit)
    data = images_of(path, size, channels, None)
    held = balanced_rows(data.y_S.numpy(), round(_TEST_SHARE * len(data.y_S)), _SPLIT_SEED)
    is_test_S = torch.zeros(len(data.y_S), dtype=torch.bool)
    is_test_S[torch.from_numpy(held)] = True
    parts = []
    for rows, most in ((~is_test_S, limit), (is_test_S, test_limit)):
        part = _rows(data, rows.nonzero().squeeze(1))
        fewer = part if most is None else _rows(part, torch.from_numpy(balanced_rows(part.y_S.numpy(), most, 0)))
        parts.append(fewer)
    return parts[0], parts[1]


def _rows(data: ImageData, rows: Tensor) -> ImageData:
    return ImageData(
        name=data.name,
        x_SCHW=data.x_SCHW[rows],
        y_S=data.y_S[rows],
        class_names=data.class_names,
        columns={name: tuple(values[row] for row in rows.tolist()) for name, values in data.columns.items()},
        source=data.source,
        licence=data.licence,
    )


@lru_cache(maxsize=16)
def _split_inputs(
    path: str,
    test_path: str,
    size: int | None,
    channels: int | None,
    limit: int | None,
    test_limit: int | None,
    domain: str,
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None,
) -> tuple[Inputs, Inputs]:
    """Returns inputs of `_split` in a domain, once per process; all tasks of these images have parts of them."""
    own = input_statistics(path, size, channels) if statistics is None else pixel_statistics(*statistics)
    train, test = _split(path, test_path, size, channels, limit, test_limit)
    return Inputs(network_inputs(train.x_SCHW, domain, own)), Inputs(network_inputs(test.x_SCHW, domain, own))


def _of_classes(inputs: Inputs, data: ImageData, classes: Sequence[int] | None) -> tuple[Inputs, Tensor]:
    """Returns inputs and labels of some classes, or of all."""
    if classes is None:
        return inputs, data.y_S
    rows_S, y_S = class_rows(data, classes)
    return inputs.part(rows_S), y_S


@lru_cache(maxsize=16)
def input_statistics(path: str, size: int | None, channels: int | None) -> tuple[Tensor, Tensor]:
    """Returns mean and standard deviation of a data set's pixels, taken as 0 to 1: `(C, 1, 1)` each."""
    mean, std = channel_statistics(images_of(path, size, channels, None).x_SCHW)
    return torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)


def pixel_statistics(mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Returns given statistics in the shape of those of `input_statistics`.

    Raises:
        TaskError: They are not equally many, or a deviation is not positive.
    """
    if len(mean) != len(std) or not mean or min(std) <= 0:
        raise TaskError(f"mean={list(mean)}, std={list(std)}: give one of each a channel, and std above 0")
    return torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)


def network_inputs(x_SCHW: Tensor, domain: str, statistics: tuple[Tensor, Tensor]) -> Tensor:
    """Returns pixels as a network sees them, float32 `(S, F)`.

    Normalised by the statistics of the whole data set, so that all its tasks and domains share them.
    """
    mean, std = statistics
    if len(mean) != x_SCHW.shape[1]:
        raise TaskError(f"mean={mean.flatten().tolist()}: images have {x_SCHW.shape[1]} channels; give one of each")
    x_SF = torch.empty(len(x_SCHW), x_SCHW.shape[1:].numel())
    # In blocks, because intermediate results of all images would take several times the memory of the result.
    for into_SF, pixels_SCHW in zip(x_SF.split(_BLOCK), x_SCHW.split(_BLOCK), strict=True):
        into_SF.copy_(((apply_domain(pixels_SCHW.float() / 255, domain) - mean) / std).flatten(1))
    return x_SF
