"""Several files of sentences as one data set."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raywgen.tasks import TaskError
from raywgen.tasks.sentence_tasks import sentence_groups
from raywgen.tasks.text_sets import set_classes, split_sets
from raywgen.weights.cache import FOLDER
from tests.text_encoders import make_encoder

Rows = list[tuple[str, int, str]]


def write(path: Path, rows: Rows) -> str:
    split, label, sentence = (list(column) for column in zip(*rows, strict=True))
    pq.write_table(pa.table({"split": split, "label": label, "sentence": sentence}), path)
    return str(path)


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    first = [("train", 0, "dog is old"), ("train", 1, "rain is new"), ("train", 0, "both have it"), ("test", 1, "rain")]
    second = [("train", 0, "red"), ("train", 1, "both have it"), ("train", 2, "song"), ("test", 2, "song is old")]
    second += [("test", 0, "dog is old")]
    return [write(tmp_path / "one.parquet", first), write(tmp_path / "two.parquet", second)]


def test_classes_are_numbered_on(paths: list[str]) -> None:
    assert set_classes(paths) == [range(2), range(2, 5)]
    data, _, test_S = split_sets(paths)
    assert data.class_names == ("0 of one", "1 of one", "0 of two", "1 of two", "2 of two")
    assert [data.sentences[row] for row in test_S.tolist()] == ["rain", "song is old", "dog is old"]
    assert data.labels[test_S].tolist() == [1, 4, 2]


def test_no_sentence_is_in_two_files_or_both_trained_and_tested_on(paths: list[str]) -> None:
    data, train_S, _ = split_sets(paths)
    found = {data.sentences[row]: int(data.labels[row]) for row in train_S.tolist()}
    # "both have it" is the last file's, and "dog is old" is tested on there.
    assert found == {"rain is new": 1, "red": 2, "both have it": 3, "song": 4}


def test_one_file_stays_as_it_is(paths: list[str]) -> None:
    data, train_S, test_S = split_sets(paths[:1])
    assert (data.class_names, len(train_S), len(test_S)) == (("0", "1"), 3, 1)


def test_a_task_may_be_about_classes_of_several_files(
    paths: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path / "cache"))
    base = make_encoder(tmp_path / "encoder")
    task = sentence_groups(paths, [[1, 2], [4]], base=base, first_layer=1, max_tokens=8)
    assert task.recipe["path"] == paths
    assert task.train_y_S.tolist() == [0, 0, 1]
    assert task.instruction == "Is the sentence about 1 of one and 0 of two, or about 2 of two?"
    with pytest.raises(TaskError, match="has no class 5; it has 0 to 4"):
        sentence_groups(paths, [[1], [5]], base=base, first_layer=1, max_tokens=8)
