"""Tasks on labelled sentences, as hashed bags of words.

Shape legend: S sentences, F features.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raywgen.tasks.base import Inputs, Task, TaskError
from raywgen.tasks.subsets import balanced_rows
from raywgen.tasks.text_datasets import TextData, load_texts

_TEST_SHARE = 0.2
_SPLIT_SEED = 0


def text_task(path: str, num_features: int = 256) -> Task:
    """Builds the task "Which of the classes does the sentence belong to?".

    Sentences are hashed into `num_features` counts of words, signed and of unit length, so that no vocabulary has to be
    kept (Weinberger et al., arXiv 0902.2206).

    Args:
        path: Path of the sentences, as `load_texts` takes it. Rows whose column `split` says `test` are tested on, or a
            fifth of each class where there are none.
        num_features: F.

    Raises:
        TaskError: The file cannot be read, or `num_features` is below 1.
    """
    if num_features < 1:
        raise TaskError(f"num_features={num_features}: must be at least 1")
    data, train_S, test_S = split_texts(path)
    x_SF = _features(path, num_features)
    return Task(
        id=f"{data.name}/{num_features}",
        instruction=f"Which of {', '.join(data.class_names)} does the sentence belong to?",
        recipe={"name": "texts", "path": path, "num_features": num_features},
        train_inputs=Inputs(x_SF, train_S),
        train_y_S=data.labels[train_S],
        test_inputs=Inputs(x_SF, test_S),
        test_y_S=data.labels[test_S],
        num_classes=len(data.class_names),
    )


@lru_cache(maxsize=8)
def split_texts(path: str) -> tuple[TextData, Tensor, Tensor]:
    """Returns the data, and the rows to train and to test on."""
    data = load_texts(path)
    names = np.array(data.split)
    is_test_S = names == "test"
    if not is_test_S.any():
        is_test_S[balanced_rows(data.labels.numpy(), round(_TEST_SHARE * len(names)), _SPLIT_SEED)] = True
    train_S = np.flatnonzero(~is_test_S & (names != "validation"))
    if not len(train_S):
        raise TaskError(f"{path}: no row is left to train on; its column 'split' should say train for some")
    return data, torch.from_numpy(train_S), torch.from_numpy(np.flatnonzero(is_test_S))


@lru_cache(maxsize=8)
def _features(path: str, num_features: int) -> Tensor:
    from sklearn.feature_extraction.text import HashingVectorizer  # Late, as in `raywgen.tasks.digits`.

    counts: Any = HashingVectorizer(n_features=num_features).transform(split_texts(path)[0].sentences)
    return torch.from_numpy(np.asarray(counts.toarray(), dtype=np.float32))
