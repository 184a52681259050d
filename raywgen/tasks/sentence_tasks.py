"""Tasks on sentences for networks that are the upper layers of a pretrained text encoder.

The layers below are frozen and the same for all tasks, so each sentence passes through them once per machine. A sample
is the sentence's feature by the whole encoder, which is what a generator's condition holds of it, followed by its
hidden states below the upper layers, which is what networks read.

Shape legend: S sentences, T tokens, H width of the encoder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raywgen.tasks.base import Inputs, Task, TaskError
from raywgen.tasks.networks.text_models import (
    PACKAGED,
    check_digest,
    encoder_digest,
    encoder_width,
    load_encoder_model,
    load_tokenizer,
)
from raywgen.tasks.networks.upper_layers import mean_feature
from raywgen.tasks.subsets import balanced_rows
from raywgen.tasks.text_datasets import TextData
from raywgen.tasks.text_sets import paths_of, split_sets
from raywgen.weights.cache import FOLDER, load_bytes_array, store_bytes_array

_SENTENCES_AT_ONCE = 64
_SEED = 0


def sentence_groups(
    path: str | Sequence[str],
    groups: Sequence[Sequence[int]],
    class_names: Sequence[str] = (),
    base: str = PACKAGED,
    first_layer: int = 5,
    max_tokens: int = 16,
    limit: int | None = None,
    test_limit: int | None = None,
    digest: str = "",
) -> Task:
    """Builds the task "Is the sentence about one of these classes, or about one of those?".

    Sentences of classes in no group are left out.

    Args:
        path: Path of the sentences, as `load_texts` takes it, or several, whose classes are numbered on from one to the
            next. Rows whose column `split` says `test` are tested on, or a fifth of each class where there are none.
        groups: Classes of the data that each class of the task consists of.
        class_names: Name of each class of the data, for the instruction; by default those that the file knows.
        base: The text encoder, as `upper_layers` takes it.
        first_layer: The first of the layers that networks consist of.
        max_tokens: T, tokens after which a sentence is cut, those at its ends included.
        limit: Number of training sentences of the data, equally many of each class; all by default.
        test_limit: Number of test sentences, likewise.
        digest: Digest of the encoder's weights, if these must be the same.

    Raises:
        TaskError: Data or encoder cannot be read, the encoder has changed, or the groups are not at least two disjoint
            sets of classes.
    """
    check_digest(base, digest)
    data, train_S, test_S = _limited(paths_of(path), limit, test_limit)
    names = tuple(class_names) or data.class_names
    _check_groups(groups, names, data)
    samples = encoded_sentences(data.sentences_at(torch.cat([train_S, test_S])), base, first_layer, max_tokens)
    group_of = torch.full((len(names),), -1)
    for number, group in enumerate(groups):
        group_of[list(group)] = number
    parts = []
    for first, rows_S in ((0, train_S), (len(train_S), test_S)):
        y_S = group_of[data.labels[rows_S]]
        kept_S = (y_S >= 0).nonzero().flatten()
        parts.append((Inputs(samples, first + kept_S), y_S[kept_S]))
    (train_inputs, train_y_S), (test_inputs, test_y_S) = parts
    options = {"class_names": list(class_names), "limit": limit, "test_limit": test_limit, "digest": digest}
    chosen = {"path": path, "groups": [list(group) for group in groups], "base": base, "first_layer": first_layer}
    sides = ["+".join(names[number] for number in group) for group in groups]
    return Task(
        id=f"{data.name}/{' or '.join(sides)}",
        instruction=question([[names[number] for number in group] for group in groups]),
        recipe={"name": "sentence-groups", **chosen, "max_tokens": max_tokens}
        | {key: value for key, value in options.items() if value},
        train_inputs=train_inputs,
        train_y_S=train_y_S,
        test_inputs=test_inputs,
        test_y_S=test_y_S,
        num_classes=len(groups),
        num_condition_features=encoder_width(base),
    )


def encoded_sentences(sentences: tuple[str, ...], base: str, first_layer: int, max_tokens: int) -> Tensor:
    """Returns samples `(S, H + T * H)` of sentences, computed only if no earlier call has done so.

    Args:
        sentences: S sentences.
        base: The text encoder, as `upper_layers` takes it.
        first_layer: The first of the layers that networks consist of.
        max_tokens: T.

    Raises:
        TaskError: The encoder is missing or has no such layer, `max_tokens` is too small for any word, or the cache's
            disk is full.
    """
    return _encoded(sentences, base, first_layer, max_tokens, encoder_digest(base))


@lru_cache(maxsize=8)
def _encoded(sentences: tuple[str, ...], base: str, first_layer: int, max_tokens: int, digest: str) -> Tensor:
    width = encoder_width(base) * (1 + max_tokens)
    blocks = _blocks(sentences, base, first_layer, max_tokens)
    return kept_samples([digest, first_layer, max_tokens, sentences], (len(sentences), width), blocks)


def kept_samples(key: Sequence[object], shape: tuple[int, int], blocks: Iterator[Tensor]) -> Tensor:
    """Returns samples `(S, F)` of texts from the cache, where they are written first if no earlier call has done so.

    Args:
        key: All that decides the samples.
        shape: S and F.
        blocks: The samples in blocks, which are computed only if they are asked for.

    Raises:
        TaskError: The cache's disk is full.
    """
    name = f"sentences-{hashlib.sha256(repr(list(key)).encode()).hexdigest()[:32]}.npy"
    stored = load_bytes_array(name)
    if stored is None:
        as_bytes = (block_SX.contiguous().view(torch.uint8).numpy() for block_SX in blocks)
        try:
            stored = store_bytes_array(name, (shape[0], shape[1] * 4), as_bytes)
        except OSError as error:
            raise TaskError(
                f"encoded sentences cannot be kept ({error}); free some disk space, or name another folder by {FOLDER}"
            ) from error
    return torch.from_numpy(stored.view(np.float32))


def encode_sentences(sentences: Sequence[str], base: str, first_layer: int, max_tokens: int) -> Tensor:
    """Returns samples `(S, H + T * H)` of sentences, computed anew; arguments as in `encoded_sentences`.

    Raises:
        TaskError: The encoder is missing or has no such layer, or `max_tokens` is too small for any word.
    """
    return torch.cat(list(_blocks(sentences, base, first_layer, max_tokens)))


@torch.no_grad()
def _blocks(sentences: Sequence[str], base: str, first_layer: int, max_tokens: int) -> Iterator[Tensor]:
    """Yields samples in blocks."""
    if max_tokens < 3:
        raise TaskError(f"max_tokens={max_tokens}: a sentence has a token at either end; give at least 3")
    model, tokenizer = load_encoder_model(base), load_tokenizer(base)
    for start in range(0, len(sentences), _SENTENCES_AT_ONCE):
        tokens: dict[str, Tensor] = dict(
            tokenizer(
                list(sentences[start : start + _SENTENCES_AT_ONCE]),
                padding="max_length",
                truncation=True,
                max_length=max_tokens,
                return_tensors="pt",
            )
        )
        output: Any = model(**tokens, output_hidden_states=True)
        if first_layer >= len(output.hidden_states) - 1:
            raise TaskError(f"first_layer={first_layer}: {base} has layers 0 to {len(output.hidden_states) - 2}")
        is_real_ST = tokens["attention_mask"].bool()
        below_STH = output.hidden_states[first_layer] * is_real_ST.unsqueeze(-1)
        yield torch.cat([mean_feature(output.last_hidden_state, is_real_ST), below_STH.flatten(1)], dim=1)


@lru_cache(maxsize=8)
def _limited(paths: tuple[str, ...], limit: int | None, test_limit: int | None) -> tuple[TextData, Tensor, Tensor]:
    """Returns the data, and the rows to train and to test on, equally many of each class."""
    data, *parts = split_sets(paths)
    for number, most in enumerate((limit, test_limit)):
        if most is not None:
            labels_S = data.labels[parts[number]].numpy()
            parts[number] = parts[number][torch.from_numpy(balanced_rows(labels_S, most, _SEED))]
    return data, parts[0], parts[1]


def _check_groups(groups: Sequence[Sequence[int]], names: Sequence[str], data: TextData) -> None:
    if len(names) < len(data.class_names):
        raise TaskError(f"class_names={list(names)}: {data.source} has {len(data.class_names)} classes; name each")
    every = [number for group in groups for number in group]
    if len(groups) < 2 or not all(groups) or len(set(every)) < len(every):
        raise TaskError(f"groups={[list(group) for group in groups]}: give two or more sets of classes, none in two")
    if wrong := [number for number in every if not 0 <= number < len(data.class_names)]:
        raise TaskError(f"groups: {data.source} has no class {wrong[0]}; it has 0 to {len(data.class_names) - 1}")


def question(groups: Sequence[Sequence[str]]) -> str:
    """Returns the question in words by which tasks tell groups of classes apart."""
    return f"Is the sentence about {', or about '.join(' and '.join(group) for group in groups)}?"
