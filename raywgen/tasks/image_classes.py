"""Some classes of labelled images as a classification task of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from raywgen.tasks.base import TaskError
from raywgen.tasks.images import ImageData


def class_rows(data: ImageData, classes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Returns the rows of the images of some classes, ascending, and their new labels: `classes[i]` becomes class i.

    Raises:
        TaskError: A class is not of the data, is given twice or has no images, or none is given.
    """
    chosen = [int(number) for number in classes]
    num_classes = len(data.class_names)
    if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(range(num_classes)):
        raise TaskError(f"classes={chosen}: give different classes from 0 to {num_classes - 1} of '{data.name}'")
    new_label = torch.full((num_classes,), -1, dtype=torch.int64)
    new_label[chosen] = torch.arange(len(chosen))
    y_S = new_label[data.y_S]
    rows_S = torch.nonzero(y_S >= 0).squeeze(1)
    counts = torch.bincount(y_S[rows_S], minlength=len(chosen)).tolist()
    if 0 in counts:
        missing = data.class_names[chosen[counts.index(0)]]
        raise TaskError(f"class '{missing}' of '{data.name}' has no images; leave it out, or load without limit=")
    return rows_S, y_S[rows_S]


def class_subset(data: ImageData, classes: Sequence[int]) -> ImageData:
    """Copies the images of some classes, labelled as `class_rows` labels them.

    Raises:
        TaskError: As `class_rows`.
    """
    rows_S, y_S = class_rows(data, classes)
    return dataclasses.replace(
        data,
        name=f"{data.name}/{'-'.join(map(str, classes))}",
        x_SCHW=data.x_SCHW[rows_S],
        y_S=y_S,
        class_names=tuple(data.class_names[number] for number in classes),
        columns={name: tuple(values[row] for row in rows_S.tolist()) for name, values in data.columns.items()},
    )
