"""What a user asks for: a task of a corpus, or an instruction, samples, or both, of a task of their own.

Shape legend: S samples, F features of a sample.
"""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raywgen.corpus import Corpus, UnknownFactError
from raywgen.generation import ConditionError
from raywgen.tasks.encoders import load_encoder
from raywgen.tasks.images import load_images
from raywgen.tasks.inputs import InputForm, input_form
from raywgen.tasks.subsets import balanced_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One task, as far as it is told.

    Attributes:
        instruction: In words; empty where none is given.
        samples_SF: Inputs as the corpus' networks take them, float32; None where none are given.
        labels_S: Their labels, int64; None where there are none.
        task_id: Of a task of the corpus; None for a task of the user's own.
    """

    instruction: str
    samples_SF: Tensor | None = None
    labels_S: Tensor | None = None
    task_id: str | None = None


def read_asked(corpus: Corpus, *, task: str, instruction: str, data: str, num_samples: int) -> Asked:
    """Reads what a command's settings name.

    Args:
        corpus: Says what samples look like.
        task: Id of a task of the corpus; empty for one of the user's own.
        instruction: A task in words, or empty.
        data: Its samples: an `.npz` file with arrays `x` and, for labelled ones, `y`; a Parquet file, glob or folder
            of labelled images; or empty.
        num_samples: Most samples that are used, equally many of each class.

    Raises:
        ConditionError: Nothing is asked for, both kinds are, or the samples cannot be read or do not fit the corpus.
        UnknownFactError: The corpus has no such task.
    """
    if bool(task) == bool(instruction or data):
        raise ConditionError(
            "give either task=ID of the corpus, or a task of your own: instruction=..., data=..., or both"
        )
    if not task:
        samples_SF, labels_S = read_samples(corpus, data) if data else (None, None)
        asked = Asked(instruction=instruction, samples_SF=samples_SF, labels_S=labels_S)
    elif task in corpus.tasks:
        facts = corpus.tasks[task]
        asked = Asked(instruction=facts.instruction, samples_SF=facts.samples_SF, labels_S=facts.labels_S, task_id=task)
    else:
        known = f"one of its tasks is {next(iter(corpus.tasks))}" if corpus.tasks else "it has no table of tasks"
        raise UnknownFactError(f"{corpus.location} has no task '{task}'; {known}")
    return _at_most(asked, num_samples)


def read_samples(corpus: Corpus, path: str) -> tuple[Tensor, Tensor | None]:
    """Samples float32 `(S, F)` as the corpus' networks take them, and labels int64 `(S,)` or None.

    Raises:
        ConditionError, TaskError: They cannot be read, or do not fit the corpus.
    """
    samples, labels = _arrays(path) if path.endswith(".npz") else _images(corpus, path)
    form = _form(corpus) if samples.dtype == torch.uint8 and samples.dim() == 4 else None
    if form is not None:
        samples = form.standardised(samples)
    samples_SF = samples.reshape(len(samples), -1).float()
    wanted = next(iter(corpus.tasks.values())).samples_SF.shape[1] if corpus.tasks else samples_SF.shape[1]
    if form is not None and form.encoder and samples_SF.shape[1] != wanted:
        samples_SF = load_encoder(form.encoder)(samples_SF)
    if samples_SF.shape[1] != wanted:
        raise ConditionError(
            f"{path}: a sample has {samples_SF.shape[1]} values, those of {corpus.location} have {wanted}; "
            "give samples of the same form"
        )
    if not bool(samples_SF.isfinite().all()):
        raise ConditionError(f"{path}: samples hold NaN or infinity; drop those samples")
    return samples_SF, labels


def _arrays(path: str) -> tuple[Tensor, Tensor | None]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            samples = torch.from_numpy(arrays["x"])
            labels = torch.from_numpy(arrays["y"]).to(torch.int64) if "y" in arrays.files else None
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ConditionError(
            f"{path}: {error}; give an .npz file with an array x (samples first), and y where labels are known"
        ) from error
    if not samples.dim() or not len(samples):
        raise ConditionError(f"{path}: x holds no samples; give at least one")
    if labels is not None and (labels.shape != samples.shape[:1] or int(labels.min()) < 0):
        raise ConditionError(f"{path}: {len(samples)} samples, labels {list(labels.shape)}; give one from 0 a sample")
    return samples, labels


def _images(corpus: Corpus, path: str) -> tuple[Tensor, Tensor]:
    form = _form(corpus)
    if form is None:
        raise ConditionError(f"{path}: the tasks of {corpus.location} are no images; give an .npz file with x and y")
    data = load_images(path, size=form.size, channels=form.channels)
    return data.x_SCHW, data.y_S.unique(return_inverse=True)[1]


def _form(corpus: Corpus) -> InputForm | None:
    task = next(iter(corpus.tasks.values()), None)
    return None if task is None else input_form(task.recipe)


def _at_most(asked: Asked, num_samples: int) -> Asked:
    if asked.samples_SF is None or len(asked.samples_SF) <= num_samples:
        return asked
    unlabelled = np.zeros(len(asked.samples_SF), dtype=np.int64)
    labels = unlabelled if asked.labels_S is None else asked.labels_S.numpy()
    rows = torch.from_numpy(balanced_rows(labels, num_samples, seed=0))
    return Asked(
        instruction=asked.instruction,
        samples_SF=asked.samples_SF[rows],
        labels_S=None if asked.labels_S is None else asked.labels_S[rows],
        task_id=asked.task_id,
    )
