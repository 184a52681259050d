"""Domains of texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from raywgen.tasks import Task, TaskError, build_task
from raywgen.tasks.domain_texts import draw_domain_classes, draw_domain_words, encode_texts
from raywgen.tasks.text_datasets import load_texts
from raywgen.weights.cache import FOLDER
from tests.text_encoders import SIGNS, WIDTH, make_decoder, make_sentences

TOKENS = 6


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv(FOLDER, str(tmp_path / "cache"))
    path, base = make_sentences(tmp_path / "signs.parquet"), make_decoder(tmp_path / "decoder")
    return {"name": "domain-texts", "path": path, "base": base, "first_layer": 1, "max_tokens": TOKENS}


def texts_of(task: Task, shared: dict[str, Any], split: str) -> list[str]:
    """Finds a task's texts by their samples."""
    inputs = task.train_inputs if split == "train" else task.test_inputs
    data = load_texts(shared["path"], split)
    every_SF = encode_texts(data.sentences, shared["base"], 1, TOKENS)
    rows = [int((every_SF - own_F).abs().sum(dim=1).argmin()) for own_F in inputs[:]]
    assert torch.allclose(every_SF[rows], inputs[:], atol=1e-5)
    return [data.sentences[row] for row in rows]


def test_a_domain_is_what_has_a_word(shared: dict[str, Any]) -> None:
    task = build_task(shared | {"word": "dog"})
    assert (task.num_classes, task.num_condition_features) == (1, 2 * WIDTH)
    assert task.instruction == "Continue texts with the word dog."
    for split in ("train", "test"):
        texts = texts_of(task, shared, split)
        assert texts
        assert all("dog" in text.split() for text in texts)
    assert not task.train_y_S.any()
    assert len(build_task(shared | {"word": "dog", "limit": 5}).train_y_S) == 5


def test_a_domain_is_a_class(shared: dict[str, Any]) -> None:
    task = build_task(shared | {"classes": [2], "class_names": SIGNS})
    assert task.instruction == "Continue texts about rain."
    assert all("rain" in text.split() for text in texts_of(task, shared, "test"))
    assert len(task.train_y_S) == 20


def test_what_is_missing_is_named(shared: dict[str, Any]) -> None:
    for arguments, message in (
        ({}, "a domain has a word or classes"),
        ({"word": "cat"}, "no text with the word cat"),
        ({"classes": [4]}, "has classes 0 to 3"),
        ({"word": "dog", "max_tokens": 1}, "max_tokens=1"),
    ):
        with pytest.raises(TaskError, match=message):
            build_task(shared | arguments)
    with pytest.raises(TaskError, match="text 1 has no words"):
        encode_texts(["rain", " "], shared["base"], 1, TOKENS)


def test_no_two_domains_have_a_word(tmp_path: Path) -> None:
    letters = [f"{first}{second}" for first in "bcdfgh" for second in "klmnpqrs"]
    files = []
    for name, own in (("one", letters[:30]), ("two", letters[20:])):
        sentences = [f"the {word} and {own[(n + 1) % len(own)]} {n}" for n, word in enumerate(own * 20)]
        # A word that no test text has.
        sentences = [f"{text} rare" if n < 40 else text for n, text in enumerate(sentences)]
        split = ["test" if n // len(own) % 5 == 4 else "train" for n in range(len(sentences))]
        path = tmp_path / f"{name}.parquet"
        pq.write_table(
            pa.table({"sentence": sentences, "label": [n % 2 for n in range(len(sentences))], "split": split}), path
        )
        files.append(str(path))
    for num_unseen_paths in (0, 1):
        drawn = draw_domain_words(files, (6, 3, 10), 0, num_unseen_paths, num_texts=8)
        assert [len(part) for part in drawn] == [6, 3, 10]
        words = [one["word"] for part in drawn for one in part]
        assert len({*words}) == 19
        assert not {"the", "and", "rare"} & {*words}
        if num_unseen_paths:
            assert {*words[:6]} <= {*letters[20:]}
            assert {*words[6:]} <= {*letters[:30]}
            assert [part[0]["classes"] for part in drawn] == [[2, 3], [0, 1], [0, 1]]
    with pytest.raises(TaskError, match=r"have \d+ words for 200 domains"):
        draw_domain_words(files, (200, 0, 0), 0, num_texts=8)
    by_class = draw_domain_classes(files, (1, 0, 2), 0, 1)
    assert by_class[0][0]["classes"][0] in (2, 3)
    assert sorted(one["classes"][0] for one in by_class[2]) == [0, 1]
    assert len({one["classes"][0] for part in draw_domain_classes(files, (1, 1, 2), 0) for one in part}) == 4
    with pytest.raises(TaskError, match="the texts have 4 classes"):
        draw_domain_classes(files, (2, 1, 2), 0)
