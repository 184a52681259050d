"""A user's own samples, checked and in one form, wherever `data=` is taken.

Shape legend: S samples, C channels, H height, W width.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raywgen.tasks.preprocessing import InputForm
from raywgen.tasks.subsets import balanced_rows
from raywgen.tasks.user_sources import TAKEN, ConditionError, Named, as_tensor, raw_data

_CHANNELS = (1, 3)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class UserData:
    """Samples of one task.

    Attributes:
        x: Inputs `(S, ...)` in the user's own shape; pixels are standardised as those of the generator's tasks.
        y_S: Their classes from 0, int64; None where there are no labels.
        class_names: Name of each class, in order.
    """

    x: Tensor
    y_S: Tensor | None
    class_names: tuple[str, ...] = ()

    @property
    def labels(self) -> Tensor:
        """Returns the classes; there must be labels."""
        assert self.y_S is not None
        return self.y_S

    def at_most(self, num: int) -> UserData:
        """Keeps at most that many samples, with as equal numbers of each class as the data allow."""
        if len(self.x) <= num:
            return self
        labels = np.zeros(len(self.x), dtype=np.int64) if self.y_S is None else self.y_S.numpy()
        rows = torch.from_numpy(balanced_rows(labels, num, seed=0))
        return replace(self, x=self.x[rows], y_S=None if self.y_S is None else self.y_S[rows])


def read_data(data: Any, form: InputForm | None = None, *, needs_labels: bool = True) -> UserData:
    """Reads a user's samples from any of several forms.

    Args:
        data: `(samples, labels)` of tensors, arrays or lists; a `DataLoader`, a `Dataset` or any iterable of pairs; a
            mapping, a pandas, Arrow or Hugging Face table with columns such as `x` and `y`; or the path of an `.npz`
            file with `x` and `y`, a Parquet file, or a folder of class folders with images. Samples alone, without
            labels, are an array, or the path of an `.npy` file or of an `.npz` file with `x`.
        form: Preprocessing of the generator's training samples, which uint8 images get, too.
        needs_labels: Whether samples without labels are refused.

    Raises:
        ConditionError: It is something else, or samples and labels do not fit each other.
        TaskError: A file cannot be read.
    """
    name = os.fspath(data) if isinstance(data, str | os.PathLike) else "data"
    inputs, labels = raw_data(data, form)
    x = as_tensor(inputs, "samples")
    if x.is_complex() or x.is_quantized:
        raise ConditionError(f"{name}: samples are {str(x.dtype).removeprefix('torch.')}; give real numbers")
    if not x.dim() or (needs_labels and labels is None):
        missing = "no labels" if x.dim() else "a single number"
        raise ConditionError(f"{name} holds samples of shape [S, ...] but {missing}; give {TAKEN}")
    if not len(x):
        raise ConditionError(f"{name} holds 0 samples and no labels; give one label per sample")
    y_S, names = (None, ()) if labels is None else _labels(labels, name, x)
    x = _standardised(x, form)
    if x.is_floating_point() and not bool(x.isfinite().all()):
        raise ConditionError(f"{name} holds NaN or infinity; drop those samples")
    return UserData(x=x, y_S=y_S, class_names=names)


def _labels(labels: Any, name: str, x: Tensor) -> tuple[Tensor, tuple[str, ...]]:
    """Returns classes int64 `(S,)` and their names."""
    names: tuple[str, ...] = ()
    if isinstance(labels, Named):
        y, names = labels.labels_S, labels.names
    else:
        words = _words(labels)
        if words is not None:
            kinds, numbers = np.unique(words, return_inverse=True)
            y, names = torch.from_numpy(numbers.astype(np.int64)), tuple(map(str, kinds))
        else:
            y = as_tensor(labels, "labels")
    if y.dim() != 1:
        raise ConditionError(
            f"{name} holds samples {list(x.shape)} and labels {list(y.shape)}; give samples of shape [S, ...] and "
            "labels of shape [S], the number of each one's class"
        )
    if len(x) != len(y) or not len(y):
        raise ConditionError(f"{name} holds {len(x)} samples and {len(y)} labels; give one label per sample")
    y_S = y.to(torch.int64)
    if y.is_floating_point() and not torch.equal(y_S.to(y.dtype), y):
        raise ConditionError(f"{name}: labels such as {float(y[y_S != y][0]):g} are no classes; number them from 0")
    if int(y_S.min()) < 0:
        raise ConditionError(f"{name}: label {int(y_S.min())} is below 0; number the classes from 0")
    return y_S, names or tuple(str(number) for number in range(int(y_S.max()) + 1))


def _words(labels: Any) -> np.ndarray | None:
    """Returns labels that are names of classes as an array of strings; None for other labels."""
    if isinstance(labels, Tensor):
        return None
    try:
        array = np.asarray(labels)
    except (ValueError, TypeError, RuntimeError):
        return None
    if array.dtype == object and array.ndim == 1 and all(isinstance(value, str) for value in array):
        return array.astype(str)
    return array if array.dtype.kind in "US" and array.ndim == 1 else None


def _standardised(x: Tensor, form: InputForm | None) -> Tensor:
    """Standardises pixels as the generator's tasks do; returns anything else as float32 or integers."""
    if x.dtype == torch.uint8 and form is not None and (images := _images(x, form)) is not None:
        return form.standardised(images).view(images.shape)
    if x.dtype in (torch.uint8, torch.bool) or x.is_floating_point():
        return x.to(torch.float32)
    return x.to(torch.int64)


def _images(x: Tensor, form: InputForm) -> Tensor | None:
    """Returns uint8 images `(S, C, H, W)` in the size and channels of the form; None for anything else."""
    if x.dim() == 3 and form.channels != 3:
        x = x.unsqueeze(1)
    if x.dim() != 4:
        return None
    if x.shape[1] not in _CHANNELS and x.shape[3] in _CHANNELS:
        x = x.permute(0, 3, 1, 2).contiguous()
    return x if x.shape[1] == len(form.mean) else None
