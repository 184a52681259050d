"""Domains of texts: networks that are the upper layers of a causal language model foresee the words of their texts.

A domain is what has a word in it, or what belongs to a class of the data. The layers below are frozen and the same for
all domains, so each text passes through them once per machine.

Shape legend: S texts, T tokens.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from raywgen.tasks.base import Inputs, Task, TaskError
from raywgen.tasks.networks.next_word import text_samples
from raywgen.tasks.networks.text_models import (
    causal_digest,
    check_causal_digest,
    encoder_width,
    load_causal_model,
    load_tokenizer,
)
from raywgen.tasks.sentence_tasks import kept_samples
from raywgen.tasks.text_sets import paths_of, set_classes, split_sets

_TEXTS_AT_ONCE = 32
_SEED = 0
# Of rarer words there are too few texts to train and test on; commoner ones are no domain.
_FEWEST, _FEWEST_TESTED, _MOST_SHARE = 32, 5, 0.2


def domain_texts(
    path: str | Sequence[str],
    base: str,
    word: str = "",
    classes: Sequence[int] = (),
    class_names: Sequence[str] = (),
    first_layer: int = 0,
    max_tokens: int = 24,
    limit: int | None = None,
    test_limit: int | None = None,
    digest: str = "",
) -> Task:
    """Builds the task "Continue texts with this word", or "Continue texts about these classes".

    All its samples are of class 0, and networks are `NextWord`s.

    Args:
        path: Path of the texts, as `load_texts` takes it, or several, whose classes are numbered on from one to the
            next. Rows whose column `split` says `test` are tested on, or a fifth of each class where there are none.
        base: The causal language model, as `next_word` takes it.
        word: A word in small letters that the texts have, as spaces separate them.
        classes: Classes of the data that the texts are of; all where there is a word.
        class_names: Name of each class of the data, for the instruction; by default those that the file knows.
        first_layer: The first of the layers that networks consist of.
        max_tokens: T, tokens after which a text is cut, the one before its first included.
        limit: Most training texts.
        test_limit: Most test texts.
        digest: Digest of the model's weights, if these must be the same.

    Raises:
        TaskError: Data or model cannot be read, the model has changed, neither a word nor classes are given, or the
            domain has no texts to train or to test on.
    """
    if not word and not classes:
        raise TaskError("a domain has a word or classes; give one of both")
    check_causal_digest(base, digest)
    data, *rows = split_sets(paths_of(path))
    names = tuple(class_names) or data.class_names
    if max(classes, default=0) >= len(names):
        raise TaskError(f"classes={list(classes)}: {data.source} has classes 0 to {len(names) - 1}")
    sides = " and ".join(names[number] for number in classes)
    what = f"with the word {word}" if word else f"about {sides}"
    samples = encoded_texts(data.sentences_at(torch.cat(rows)), base, first_layer, max_tokens)
    parts, first = [], 0
    for rows_S, most in zip(rows, (limit, test_limit), strict=True):
        kept = _rows_of(data.sentences_at(rows_S), data.labels[rows_S].tolist(), word, classes)
        if not kept:
            raise TaskError(f"{data.source}: no text {what} is there to train or to test on; choose another domain")
        parts.append(Inputs(samples, first + torch.tensor(sorted(kept[:most]))))
        first += len(rows_S)
    options = {"word": word, "classes": list(classes), "class_names": list(class_names)}
    options |= {"limit": limit, "test_limit": test_limit, "digest": digest}
    chosen = {"path": path, "base": base, "first_layer": first_layer, "max_tokens": max_tokens}
    train_inputs, test_inputs = parts
    return Task(
        id=f"{data.name}/{f'word-{word}' if word else sides}",
        instruction=f"Continue texts {what}.",
        recipe={"name": "domain-texts", **chosen} | {key: value for key, value in options.items() if value},
        train_inputs=train_inputs,
        train_y_S=torch.zeros(len(train_inputs), dtype=torch.int64),
        test_inputs=test_inputs,
        test_y_S=torch.zeros(len(test_inputs), dtype=torch.int64),
        num_classes=1,
        num_condition_features=2 * encoder_width(base),
    )


def _rows_of(texts: Sequence[str], labels: Sequence[int], word: str, classes: Sequence[int]) -> list[int]:
    """Returns which texts belong to a domain, in an order of their own."""
    kept = [
        row
        for row, (text, label) in enumerate(zip(texts, labels, strict=True))
        if text.strip() and (not word or word in text.lower().split()) and (not classes or label in classes)
    ]
    random.Random(_SEED).shuffle(kept)
    return kept


def encoded_texts(texts: tuple[str, ...], base: str, first_layer: int, max_tokens: int) -> Tensor:
    """Returns samples of texts, as `text_samples` makes them, computed only if no earlier call has done so.

    Args:
        texts: S texts.
        base: The causal language model, as `next_word` takes it.
        first_layer: The first of the layers that networks consist of.
        max_tokens: T.

    Raises:
        TaskError: The model is missing or has no such layer, `max_tokens` is too small for a word, or the cache's disk
            is full.
    """
    return _encoded(texts, base, first_layer, max_tokens, causal_digest(base))


@lru_cache(maxsize=8)
def _encoded(texts: tuple[str, ...], base: str, first_layer: int, max_tokens: int, digest: str) -> Tensor:
    width = encoder_width(base)
    shape = len(texts), 2 * width + max_tokens * (1 + width)
    return kept_samples(
        ["causal", digest, first_layer, max_tokens, texts], shape, _blocks(texts, base, first_layer, max_tokens)
    )


def encode_texts(texts: Sequence[str], base: str, first_layer: int, max_tokens: int) -> Tensor:
    """Returns samples of texts, computed anew; arguments as in `encoded_texts`.

    Raises:
        TaskError: The model is missing or has no such layer, a text has no words, or `max_tokens` is too small for one.
    """
    if empty := [row for row, text in enumerate(texts) if not text.strip()]:
        raise TaskError(f"text {empty[0]} has no words; leave it out")
    return torch.cat(list(_blocks(texts, base, first_layer, max_tokens)))


def _blocks(texts: Sequence[str], base: str, first_layer: int, max_tokens: int) -> Iterator[Tensor]:
    """Yields samples in blocks."""
    if max_tokens < 2:
        raise TaskError(f"max_tokens={max_tokens}: a text has a token before its first; give at least 2")
    model, tokenizer = load_causal_model(base), load_tokenizer(base)
    # Some models know no beginning of a text, and were trained with the end of the one before it.
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if begin is None:
        raise TaskError(f"{base}: its tokeniser has no token for the beginning or the end of a text; give it one")
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        block = list(texts[start : start + _TEXTS_AT_ONCE])
        found = tokenizer(block, add_special_tokens=False)["input_ids"]
        tokens_ST = torch.zeros(len(block), max_tokens, dtype=torch.int64)
        is_real_ST = torch.zeros(len(block), max_tokens, dtype=torch.bool)
        for row, own in enumerate(found):
            kept = [begin, *own][:max_tokens]
            tokens_ST[row, : len(kept)], is_real_ST[row, : len(kept)] = torch.tensor(kept), True
        yield text_samples(model, tokens_ST, is_real_ST, first_layer)


def draw_domain_words(
    paths: Sequence[str], counts: Sequence[int], seed: int, num_unseen_paths: int = 0, num_texts: int | None = None
) -> list[list[dict[str, Any]]]:
    """Draws arguments of `domain_texts` for unseen, validation and seen domains, each with a word of its own.

    Words that say nothing of a topic, such as "the", are left out.

    Args:
        paths: Files of texts.
        counts: Numbers of unseen, validation and seen domains.
        seed: Seed of the draw.
        num_unseen_paths: Number of files, the last ones, that only unseen domains have, and these alone; 0 for all.
        num_texts: Fewest training texts that have the word; 32 by default.

    Raises:
        TaskError: The texts have not enough words that are neither rare nor common.
    """
    of_paths = set_classes(paths)
    known, new = (of_paths[:-num_unseen_paths], of_paths[-num_unseen_paths:]) if num_unseen_paths else (of_paths,) * 2
    rng, drawn = random.Random(seed), []
    used: set[str] = set()
    for ranges, numbers in ((new, counts[:1]), (known, counts[1:])):
        classes = [number for own in ranges for number in own]
        words = [word for word in _topics(paths, classes, num_texts or _FEWEST) if word not in used]
        if sum(numbers) > len(words):
            raise TaskError(
                f"the texts have {len(words)} words for {sum(numbers)} domains; ask for fewer, or give more"
            )
        rng.shuffle(words)
        for number in numbers:
            drawn.append([{"word": word, "classes": classes} for word in words[:number]])
            used.update(words[:number])
            words = words[number:]
    return drawn


def draw_domain_classes(
    paths: Sequence[str], counts: Sequence[int], seed: int, num_unseen_paths: int = 0
) -> list[list[dict[str, Any]]]:
    """Draws arguments of `domain_texts` for unseen, validation and seen domains, each a class; as `draw_domain_words`.

    Raises:
        TaskError: There are not enough classes.
    """
    of_paths = set_classes(paths)
    classes = [[number] for own in of_paths for number in own]
    num_new = sum(len(own) for own in of_paths[len(of_paths) - num_unseen_paths :])
    known, new = classes[: len(classes) - num_new], classes[len(classes) - num_new :]
    rng = random.Random(seed)
    rng.shuffle(known)
    rng.shuffle(new)
    if not num_unseen_paths:
        known, new = known[counts[0] :], known[: counts[0]]
    if counts[0] > len(new) or sum(counts[1:]) > len(known):
        raise TaskError(
            f"the texts have {len(classes)} classes, {len(new)} of them for unseen domains; {counts[0]} unseen, "
            f"{counts[1]} validation and {counts[2]} seen ones are too many"
        )
    chosen = [new[: counts[0]], known[: counts[1]], known[counts[1] : sum(counts[1:])]]
    return [[{"classes": one} for one in part] for part in chosen]


def _topics(paths: Sequence[str], classes: Sequence[int], least: int) -> list[str]:
    """Returns the words that enough training and test texts of these classes have, and not too many."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS  # Late, as in `raywgen.tasks.digits`.

    data, *rows = split_sets(paths)
    own = torch.tensor(classes)
    trained, tested = (data.sentences_at(rows_S[torch.isin(data.labels[rows_S], own)]) for rows_S in rows)
    held, held_tested = (Counter(word for text in texts for word in set(_words(text))) for texts in (trained, tested))
    most = _MOST_SHARE * len(trained)
    return sorted(
        word
        for word, count in held.items()
        if least <= count <= most and held_tested[word] >= _FEWEST_TESTED and word not in ENGLISH_STOP_WORDS
    )


def _words(text: str) -> list[str]:
    return [word for word in text.lower().split() if word.isalpha()]
