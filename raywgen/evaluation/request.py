"""Reads the task that a user asks about: one of a corpus, or one of their own by an instruction, samples, or both."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raywgen.corpus import Corpus
from raywgen.corpus.chosen import task_named
from raywgen.tasks.encoders import load_encoder
from raywgen.tasks.preprocessing import InputForm, input_form
from raywgen.tasks.subsets import balanced_rows
from raywgen.tasks.user_data import ConditionError, read_data
from raywgen.trust import reading


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRequest:
    """A task as the user describes it.

    Attributes:
        instruction: The task in words; empty where no words are given.
        samples_SF: Inputs as the corpus' networks take them, float32; None where none are given.
        labels_S: Their labels, int64; None where there are none.
        task_id: Id of a task of the corpus; None for a task of the user's own.
    """

    instruction: str
    samples_SF: Tensor | None = None
    labels_S: Tensor | None = None
    task_id: str | None = None


def read_task_request(corpus: Corpus, *, task: str, instruction: str, data: str, num_samples: int) -> TaskRequest:
    """Reads the task that the settings of a command name.

    Args:
        corpus: Corpus whose samples the task's samples must fit.
        task: Id of a task of the corpus; empty for one of the user's own.
        instruction: A task in words, or empty.
        data: Its samples, as `read_data` takes a path; or empty.
        num_samples: Maximum number of samples that are used, equally many of each class.

    Raises:
        ConditionError: No task is given, or both kinds are, or the samples cannot be read or do not fit the corpus.
        UnknownFactError: The corpus has no such task.
    """
    if bool(task) == bool(instruction or data):
        raise ConditionError(
            "give either task=ID of the corpus, or a task of your own: instruction=..., data=..., or both"
        )
    if not task:
        samples_SF, labels_S = read_samples(corpus, data) if data else (None, None)
        request = TaskRequest(instruction=instruction, samples_SF=samples_SF, labels_S=labels_S)
    else:
        facts = task_named(corpus, task)
        request = TaskRequest(
            instruction=facts.instruction, samples_SF=facts.samples_SF, labels_S=facts.labels_S, task_id=task
        )
    return _at_most(request, num_samples)


def read_samples(corpus: Corpus, path: str) -> tuple[Tensor, Tensor | None]:
    """Reads samples float32 `(S, F)` as the corpus' networks take them, and labels int64 `(S,)` or None.

    Raises:
        ConditionError, TaskError: They cannot be read, or do not fit the corpus.
    """
    form = _form(corpus)
    data = read_data(path, form, needs_labels=False)
    samples_SF = data.x.reshape(len(data.x), -1).float()
    wanted = next(iter(corpus.tasks.values())).samples_SF.shape[1] if corpus.tasks else samples_SF.shape[1]
    if form is not None and form.encoder and samples_SF.shape[1] != wanted:
        with reading(corpus.location):
            samples_SF = load_encoder(form.encoder)(samples_SF)
    if samples_SF.shape[1] != wanted:
        raise ConditionError(
            f"{path}: a sample has {samples_SF.shape[1]} values, those of {corpus.location} have {wanted}; "
            "give samples of the same form"
        )
    return samples_SF, data.y_S


def _form(corpus: Corpus) -> InputForm | None:
    task = next(iter(corpus.tasks.values()), None)
    return None if task is None else input_form(task.recipe)


def _at_most(request: TaskRequest, num_samples: int) -> TaskRequest:
    if request.samples_SF is None or len(request.samples_SF) <= num_samples:
        return request
    unlabelled = np.zeros(len(request.samples_SF), dtype=np.int64)
    labels = unlabelled if request.labels_S is None else request.labels_S.numpy()
    rows = torch.from_numpy(balanced_rows(labels, num_samples, seed=0))
    return TaskRequest(
        instruction=request.instruction,
        samples_SF=request.samples_SF[rows],
        labels_S=None if request.labels_S is None else request.labels_S[rows],
        task_id=request.task_id,
    )
