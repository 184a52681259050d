"""Measures how similar one task is to others, by its words and by its data; labels are not needed.

Shape letters beyond the legend in `raywgen.weights`: T stored tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer

_WORD = r"\w+"
"""Single characters count: in "one of 1, 4 or 7" they are what matters."""


def word_vectors() -> TfidfVectorizer:
    """Returns a vectoriser of texts: unit vectors of their words, in which rare words weigh more."""
    from sklearn.feature_extraction.text import TfidfVectorizer  # Late, as in `raywgen.tasks.digits`.

    return TfidfVectorizer(token_pattern=_WORD)


def text_similarity(text: str, stored: Sequence[str]) -> Tensor:
    """Returns the cosine `(T,)` in [0, 1] between word vectors; 0 everywhere if no text has a word."""
    try:
        vectors = word_vectors().fit([*stored, text])
    except ValueError:
        return torch.zeros(len(stored))
    similar = vectors.transform(stored) @ vectors.transform([text]).T
    return torch.from_numpy(np.asarray(similar.todense()).ravel()).float().clamp(0, 1)


def data_similarity(samples_SF: Tensor, stored: Sequence[Tensor]) -> Tensor:
    """Returns `1 / (1 + d)`, `(T,)`, d the squared Frechet distance between diagonal Gaussians of two sets of samples.

    d = mean over features of ((mean - mean')^2 + (std - std')^2) / variance, the variance of each feature being that
    over all stored samples (Dowson and Landau, 1982, for Gaussians whose covariances commute).

    Args:
        samples_SF: Samples to compare with the stored ones.
        stored: T sets of samples of the same F.
    """
    # Bounded below, because a feature that hardly varies, such as an always black pixel, would decide alone.
    variance_F = torch.cat(list(stored)).var(dim=0, unbiased=False)
    variance_F = variance_F.clamp(min=max(float(variance_F.mean()) * 1e-3, 1e-12))
    mean_TF = torch.stack([samples.mean(dim=0) for samples in stored])
    std_TF = torch.stack([samples.std(dim=0, unbiased=False) for samples in stored])
    offset_TF = (mean_TF - samples_SF.mean(dim=0)).square() + (std_TF - samples_SF.std(dim=0, unbiased=False)).square()
    return 1 / (1 + (offset_TF / variance_F).mean(dim=1))
