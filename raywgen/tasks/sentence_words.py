"""Tasks on the words of sentences: is one of these words in it, or has it more than so many?

They are families of tasks without labels, for networks that are the upper layers of a text encoder. Training and test
sentences are those of the data; each task has equally many with and without.

Shape legend: S sentences.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raywgen.tasks.base import Inputs, Task, TaskError
from raywgen.tasks.networks.text_models import PACKAGED, check_digest, encoder_width
from raywgen.tasks.sentence_tasks import encoded_sentences
from raywgen.tasks.subsets import balanced_rows
from raywgen.tasks.text_sets import paths_of, split_sets

ANY_OF = 6
_SEED = 0
# Of rarer words there are too few sentences to train and test on, of commoner ones too few without them.
_LEAST_SHARE, _MOST_SHARE = 0.01, 0.4
_UNSEEN_SHARE = 0.2


def sentence_words(
    path: str | Sequence[str],
    words: Sequence[str] = (),
    longer_than: int = 0,
    base: str = PACKAGED,
    first_layer: int = 5,
    max_tokens: int = 16,
    limit: int | None = None,
    test_limit: int | None = None,
    digest: str = "",
) -> Task:
    """Builds the task "Does the sentence hold one of these words?", or "Has it more than so many words?".

    Args:
        path: Path of the sentences, as `sentence_groups` takes it.
        words: Words, in small letters, as spaces separate them; or none.
        longer_than: Number of words that sentences of class 1 have more of, where no words are given.
        base: The text encoder, as `upper_layers` takes it.
        first_layer: The first of the layers that networks consist of.
        max_tokens: T, tokens after which a sentence is cut, those at its ends included.
        limit: Number of training sentences, equally many of each class; all by default.
        test_limit: Number of test sentences, likewise.
        digest: Digest of the encoder's weights, if these must be the same.

    Raises:
        TaskError: Data or encoder cannot be read, the encoder has changed, neither words nor a length are given or
            both are, or a class has no sentences.
    """
    if bool(words) == (longer_than > 0):
        raise TaskError(f"words={list(words)}, longer_than={longer_than}: give words, or a length above 0, one of both")
    check_digest(base, digest)
    data, *rows = split_sets(paths_of(path))
    samples = encoded_sentences(data.sentences_at(torch.cat(rows)), base, first_layer, max_tokens)
    parts, first = [], 0
    for rows_S, most in zip(rows, (limit, test_limit), strict=True):
        y_S = _answers(data.sentences_at(rows_S), words, longer_than)
        kept_S = torch.from_numpy(balanced_rows(y_S.numpy(), _of_both(y_S, most), _SEED))
        if len(y_S[kept_S].unique()) < 2:
            raise TaskError(f"{data.source}: all or no sentences answer words={list(words)}, longer_than={longer_than}")
        parts.append((Inputs(samples, first + kept_S), y_S[kept_S]))
        first += len(rows_S)
    (train_inputs, train_y_S), (test_inputs, test_y_S) = parts
    options = {"words": list(words), "longer_than": longer_than}
    options |= {"limit": limit, "test_limit": test_limit, "digest": digest}
    chosen = {"path": path, "base": base, "first_layer": first_layer, "max_tokens": max_tokens}
    return Task(
        id=f"{data.name}/{'longer-' + str(longer_than) if longer_than else 'any-' + '+'.join(words)}",
        instruction=_question(words, longer_than),
        recipe={"name": "sentence-words", **chosen} | {key: value for key, value in options.items() if value},
        train_inputs=train_inputs,
        train_y_S=train_y_S,
        test_inputs=test_inputs,
        test_y_S=test_y_S,
        num_classes=2,
        num_condition_features=encoder_width(base),
    )


def draw_sentence_words(paths: Sequence[str], counts: Sequence[int], seed: int) -> list[list[dict[str, Any]]]:
    """Draws arguments of `sentence_words` for unseen, validation and seen tasks.

    Half of each are about one word, four in ten about any of six, the rest about lengths. The words of unseen tasks
    are in no other task, and their lengths are others, too.

    Args:
        paths: Files of sentences.
        counts: Numbers of unseen, validation and seen tasks.
        seed: Seed of the draw.

    Raises:
        TaskError: The sentences have not enough words that are neither rare nor in nearly all.
    """
    data, train_S, _ = split_sets(paths)
    sentences = data.sentences_at(train_S)
    held = Counter(word for text in sentences for word in set(_words(text)) if word.isalpha())
    bounds = _LEAST_SHARE * len(sentences), _MOST_SHARE * len(sentences)
    known = sorted(word for word, count in held.items() if bounds[0] <= count <= bounds[1])
    rng = random.Random(seed)
    rng.shuffle(known)
    num_new = round(_UNSEEN_SHARE * len(known))
    lengths = np.unique(np.quantile([len(_words(text)) for text in sentences], np.linspace(0.2, 0.8, 9)).astype(int))
    drawn = []
    for words, offset, numbers in ((known[:num_new], 1, counts[:1]), (known[num_new:], 0, counts[1:])):
        num = sum(numbers)
        tasks = _arguments(words, [int(length) for length in lengths[offset::2]], num, rng)
        for number in numbers:
            drawn.append(tasks[:number])
            tasks = tasks[number:]
    return drawn


def _arguments(words: list[str], lengths: list[int], num: int, rng: random.Random) -> list[dict[str, Any]]:
    """Draws tasks of the three families in random order."""
    num_single, num_lengths = (num + 1) // 2, min(num // 10, len(lengths))
    if num_single > len(words) or len(words) < ANY_OF:
        raise TaskError(
            f"the sentences have {len(words)} words for {num} tasks, half of which are about a word each; ask for "
            "fewer tasks, or give more sentences"
        )
    tasks: list[dict[str, Any]] = [{"words": [word]} for word in words[:num_single]]
    tasks += [{"longer_than": length} for length in rng.sample(lengths, num_lengths)]
    tasks += [{"words": sorted(rng.sample(words, ANY_OF))} for _ in range(num - len(tasks))]
    rng.shuffle(tasks)
    return tasks


def _words(text: str) -> list[str]:
    return text.lower().split()


def _answers(sentences: Sequence[str], words: Sequence[str], longer_than: int) -> Tensor:
    """Returns 1 for each sentence that is of the kind asked for, int64 `(S,)`."""
    wanted = set(words)
    if longer_than:
        return torch.tensor([int(len(_words(text)) > longer_than) for text in sentences])
    return torch.tensor([int(not wanted.isdisjoint(_words(text))) for text in sentences])


def _of_both(y_S: Tensor, most: int | None) -> int:
    """Returns how many sentences can be taken, as many of each class."""
    num_less = int(torch.minimum(y_S.sum(), (1 - y_S).sum()))
    return 2 * num_less if most is None else min(most, 2 * num_less)


def _question(words: Sequence[str], longer_than: int) -> str:
    if longer_than:
        return f"Has the sentence more than {longer_than} words?"
    if len(words) == 1:
        return f"Does the sentence hold the word {words[0]}?"
    return f"Does the sentence hold one of the words {', '.join(words)}?"
