"""Several files of labelled sentences as one data set.

Classes are numbered on from one file to the next. No sentence is in two files: one that several have stays in the last
of them alone, and none that is tested on is trained on, so that the last files can be left out whole.

Shape legend: S sentences.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from raywgen.tasks.text_datasets import TextData
from raywgen.tasks.text_tasks import split_texts


def paths_of(path: str | Sequence[str]) -> tuple[str, ...]:
    """Returns the files of a recipe that names one or several."""
    return (path,) if isinstance(path, str) else tuple(path)


def set_classes(paths: Sequence[str]) -> list[range]:
    """Returns the numbers of the classes of each file.

    Raises:
        TaskError: A file cannot be read.
    """
    counts = [len(split_texts(path)[0].class_names) for path in paths]
    return [range(end - count, end) for count, end in zip(counts, accumulate(counts), strict=True)]


def split_sets(paths: Sequence[str]) -> tuple[TextData, Tensor, Tensor]:
    """Returns the data of one file as it is, or of several as one, and the rows to train and to test on.

    Raises:
        TaskError: A file cannot be read.
    """
    return split_texts(paths[0]) if len(paths) == 1 else _joined(tuple(paths))


@lru_cache(maxsize=4)
def _joined(paths: tuple[str, ...]) -> tuple[TextData, Tensor, Tensor]:
    each = [split_texts(path) for path in paths]
    sets = [data for data, _, _ in each]
    first = [0, *accumulate(len(data.sentences) for data in sets)]
    joined = TextData(
        name="+".join(data.name for data in sets),
        sentences=tuple(sentence for data in sets for sentence in data.sentences),
        labels=torch.cat([data.labels + own.start for data, own in zip(sets, set_classes(paths), strict=True)]),
        split=tuple(part for data in sets for part in data.split),
        class_names=tuple(f"{name} of {data.name}" for data in sets for name in data.class_names),
        source=", ".join(paths),
    )
    file_of = [number for number, data in enumerate(sets) for _ in data.sentences]
    last = dict(zip(joined.sentences, file_of, strict=True))
    is_kept_S = torch.tensor([last[text] == own for text, own in zip(joined.sentences, file_of, strict=True)])
    train_S, test_S = (
        torch.cat([rows_S + start for rows_S, start in zip(parts, first, strict=False)])
        for parts in ([train_S for _, train_S, _ in each], [test_S for _, _, test_S in each])
    )
    train_S, test_S = train_S[is_kept_S[train_S]], test_S[is_kept_S[test_S]]
    tested = set(joined.sentences_at(test_S))
    is_fresh_S = torch.tensor([text not in tested for text in joined.sentences_at(train_S)])
    return joined, train_S[is_fresh_S], test_S
