"""Tasks on the words of sentences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from raywgen.tasks import TaskError, build_task
from raywgen.tasks.sentence_words import draw_sentence_words
from raywgen.weights.cache import FOLDER
from tests.text_encoders import SIGNS, WIDTH, make_encoder, make_sentences


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv(FOLDER, str(tmp_path / "cache"))
    path, base = make_sentences(tmp_path / "signs.parquet"), make_encoder(tmp_path / "encoder")
    return {"name": "sentence-words", "path": path, "base": base, "first_layer": 1, "max_tokens": 8}


def test_a_word_splits_the_sentences_evenly(recipe: dict[str, Any]) -> None:
    task = build_task(recipe | {"words": ["dog"]})
    assert task.instruction == "Does the sentence hold the word dog?"
    assert task.train_y_S.bincount().tolist() == [20, 20]
    assert task.test_y_S.bincount().tolist() == [10, 10]
    assert task.num_condition_features == WIDTH
    table = pq.read_table(recipe["path"]).to_pylist()
    test = [row for row in table if row["split"] == "test"]
    other = build_task(recipe | {"words": SIGNS[:2]})
    assert other.test_inputs.x_XF is task.test_inputs.x_XF, "tasks share their samples"
    assert other.test_y_S.bincount().tolist() == [20, 20]
    assert other.test_inputs.rows_S is not None
    for row, answer in zip(other.test_inputs.rows_S.tolist(), other.test_y_S.tolist(), strict=True):
        assert answer == (test[row - 80]["label"] < 2)
    assert torch.equal(build_task(other.recipe).train_x_SF, other.train_x_SF)


def test_limits_are_of_each_task(recipe: dict[str, Any]) -> None:
    task = build_task(recipe | {"words": ["dog"], "limit": 12, "test_limit": 6})
    assert task.train_y_S.bincount().tolist() == [6, 6]
    assert task.test_y_S.bincount().tolist() == [3, 3]


def test_what_is_asked_must_be_one_thing_that_some_answer(recipe: dict[str, Any]) -> None:
    for wrong in ({}, {"words": ["dog"], "longer_than": 2}):
        with pytest.raises(TaskError, match="give words, or a length above 0, one of both"):
            build_task(recipe | wrong)
    with pytest.raises(TaskError, match="all or no sentences answer"):
        build_task(recipe | {"longer_than": 9})


def write(path: Path, num_words: int) -> str:
    """Sentences of various lengths, each word in about a tenth of them."""
    generator = torch.Generator().manual_seed(0)
    names = ["".join(chr(97 + int(digit)) for digit in f"{number:03d}") for number in range(num_words)]
    sentences = [
        " ".join(names[place] for place in torch.randint(num_words, (4 + row % 12,), generator=generator).tolist())
        for row in range(400)
    ]
    pq.write_table(pa.table({"label": [0] * 400, "sentence": sentences}), path)
    return str(path)


def test_unseen_tasks_ask_for_words_and_lengths_that_no_other_does(tmp_path: Path) -> None:
    path = write(tmp_path / "words.parquet", 80)
    unseen, validation, seen = draw_sentence_words([path], (20, 4, 40), seed=3)
    assert [len(part) for part in (unseen, validation, seen)] == [20, 4, 40]
    known = {word for task in validation + seen for word in task.get("words", [])}
    new = {word for task in unseen for word in task.get("words", [])}
    assert new
    assert known
    assert not new & known
    lengths = [{task["longer_than"] for task in part if "longer_than" in task} for part in (unseen, validation + seen)]
    assert all(lengths)
    assert not lengths[0] & lengths[1]
    assert {len(task["words"]) for task in unseen + seen if "words" in task} == {1, 6}
    assert draw_sentence_words([path], (20, 4, 40), seed=3) == [unseen, validation, seen]
    with pytest.raises(TaskError, match="words for 80 tasks"):
        draw_sentence_words([path], (80, 4, 40), seed=3)
