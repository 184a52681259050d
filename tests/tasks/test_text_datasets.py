from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from raywgen.tasks.base import TaskError
from raywgen.tasks.text_datasets import load_texts

REAL_DATA = Path(__file__).parents[3] / "shared" / "data"


def write(path: Path, metadata: dict[str, str] | None = None, **columns: list) -> Path:
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path)
    return path


@pytest.mark.parametrize(
    ("name", "num", "num_classes", "splits"),
    [
        ("trec", 5952, 6, {"train", "test"}),
        ("sst2", 9613, 2, {"train", "validation", "test"}),
        ("cr", 3775, 2, {"all"}),
        ("mr", 10662, 2, {"all"}),
    ],
)
def test_real_texts_are_read_whole_and_by_split(name: str, num: int, num_classes: int, splits: set[str]) -> None:
    path = REAL_DATA / f"text-{name}.parquet"
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    data = load_texts(path)
    stored = pq.read_table(path).to_pydict()
    assert len(data.sentences) == num
    assert list(data.sentences) == stored["sentence"]
    assert data.labels.tolist() == stored["label"]
    assert data.labels.dtype == torch.int64
    assert set(data.split) == splits
    assert data.class_names == tuple(map(str, range(num_classes)))
    parts = {split: load_texts(path, split=split) for split in splits}
    assert sum(len(part.sentences) for part in parts.values()) == num
    for split, part in parts.items():
        rows = [row for row, part in enumerate(stored["split"]) if part == split]
        assert list(part.sentences) == [stored["sentence"][row] for row in rows]
        assert part.labels.tolist() == [stored["label"][row] for row in rows]
        assert set(part.split) == {split}


def test_class_names_come_from_the_hubs_metadata(tmp_path: Path) -> None:
    features = {"label": {"_type": "ClassLabel", "names": ["bad", "good"]}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    data = load_texts(write(tmp_path / "t.parquet", metadata, sentence=["a", "b"], label=[1, 1]))
    assert data.class_names == ("bad", "good")
    assert data.split == ("all", "all")
    assert data.name == "t"


@pytest.mark.parametrize("metadata", [{"huggingface": "{"}, {"huggingface": "[]"}, {"huggingface": '{"info": null}'}])
def test_metadata_of_another_kind_is_passed_over(tmp_path: Path, metadata: dict[str, str]) -> None:
    data = load_texts(write(tmp_path / "t.parquet", metadata, sentence=["a", "b"], label=[2, 0]))
    assert data.class_names == ("0", "1", "2")


def test_texts_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="no such file"):
        load_texts(tmp_path / "absent.parquet")
    with pytest.raises(TaskError, match=r"is a folder; give a Parquet file or a glob such as"):
        load_texts(tmp_path)
    with pytest.raises(TaskError, match=r"no column 'sentence' \(it has: text, label\); rename"):
        load_texts(write(tmp_path / "a.parquet", text=["a"], label=[0]))
    with pytest.raises(TaskError, match=r"b.parquet row 1: 'sentence' is None"):
        load_texts(write(tmp_path / "b.parquet", sentence=["a", None], label=[0, 0]))
    with pytest.raises(TaskError, match=r"c.parquet row 2: 'label' is -1"):
        load_texts(write(tmp_path / "c.parquet", sentence=["a", "b", "c"], label=[0, 0, -1]))
    path = write(tmp_path / "d.parquet", sentence=["a", "b"], label=[0, 0], split=["train", "dev"])
    with pytest.raises(TaskError, match=r"no split 'test'; it has: dev, train"):
        load_texts(path, split="test")
    with pytest.raises(TaskError, match="has no rows"):
        load_texts(write(tmp_path / "e.parquet", sentence=[], label=[]))
