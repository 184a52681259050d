from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from safetensors.torch import save_file

from raywgen.corpus import Corpus, CorpusError
from raywgen.corpus.build import BuildConfig, build_corpus
from raywgen.corpus.facts_file import read_facts
from raywgen.corpus.facts_join import join_facts
from raywgen.corpus.sources import SourceCheckpoint
from tests.corpus.builders import network


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        pyarrow.csv.write_csv(table, path)
    return str(path)


def build(tmp_path: Path, facts: str) -> Corpus:
    for seed, name in enumerate(["cnn/a", "cnn/b", "mlp/a"]):
        path = tmp_path / "nets" / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(network(3, seed), path)
    config = BuildConfig(out=str(tmp_path / "c"), sources=[str(tmp_path / "nets")], facts=facts, distributed=False)
    return build_corpus(config)


def facts_of(facts: str, name: str, file: str) -> dict[str, Any]:
    """The facts of one checkpoint in a file."""
    (joined,), _ = join_facts(read_facts(facts), [SourceCheckpoint(name=name, files=(file,), num_bytes=1)])
    return joined.facts


ROWS = [
    {"path": "cnn/*", "architecture": "cnn", "test_accuracy": 0.5, "step": 3, "dataset": "digits"},
    {"path": "*/b", "architecture": "cnn", "test_accuracy": 0.75, "step": 4, "dataset": None},
]


@pytest.mark.parametrize("suffix", ["csv", "json", "parquet"])
def test_facts_of_every_kind_of_file_reach_the_corpus(tmp_path: Path, suffix: str) -> None:
    corpus = build(tmp_path, write(tmp_path / f"facts.{suffix}", ROWS))
    rows = {row["checkpoint_id"]: row for row in corpus.facts.to_pylist()}
    found = {name: tuple(row[key] for key in ("architecture", "step", "dataset")) for name, row in rows.items()}
    assert found == {"cnn/a": ("cnn", 3, "digits"), "cnn/b": ("cnn", 4, "digits"), "mlp/a": ("", 0, None)}
    assert [rows[name]["test_accuracy"] for name in ("cnn/a", "cnn/b")] == [0.5, 0.75]
    assert corpus.query(["dataset=digits"]).num_rows == 2


def test_later_patterns_win_and_an_exact_name_beats_them_all(tmp_path: Path) -> None:
    path = write(
        tmp_path / "facts.json",
        [
            {"path": "cnn/a", "step": 1},
            {"path": "*", "step": 2, "licence": "MIT"},
            {"path": "cnn/?", "step": 3},
        ],
    )
    assert facts_of(path, "cnn/a", "/x/cnn/a.pt") == {"step": 1, "licence": "MIT"}
    assert facts_of(path, "cnn/b", "/x/cnn/b.pt") == {"step": 3, "licence": "MIT"}
    assert facts_of(path, "mlp/b", "/x/mlp/b.pt") == {"step": 2, "licence": "MIT"}


def test_rows_about_one_checkpoint_add_up_and_the_later_wins(tmp_path: Path) -> None:
    rows = [{"path": "a", "step": 1, "licence": "MIT"}, {"path": "a", "step": 2}]
    assert facts_of(write(tmp_path / "facts.json", rows), "a", "/x/a.pt") == {"step": 2, "licence": "MIT"}


@pytest.mark.parametrize("where", ["a", "a.pt", "/x/a.pt", "/x/*.pt"])
def test_a_row_may_name_the_file(tmp_path: Path, where: str) -> None:
    path = write(tmp_path / "facts.json", [{"path": where, "step": 5}])
    assert facts_of(path, "a", "/x/a.pt") == {"step": 5}
    assert facts_of(path, "b", "/x/b.npy") == {}


def test_an_empty_cell_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "facts.csv").write_text("path,architecture,step\n*,cnn,7\na,,\n")
    assert facts_of(str(tmp_path / "facts.csv"), "a", "/x/a.pt") == {"architecture": "cnn", "step": 7}


def test_known_facts_get_their_types_and_others_stay_or_become_text(tmp_path: Path) -> None:
    row = {"path": "a", "step": "12", "start_seed": 3.0, "learning_rate": "1e-3", "architecture": 18}
    more = {"depth": 4, "score": 0.5, "frozen": True, "tags": ["x"]}
    found = facts_of(write(tmp_path / "facts.json", [row | more]), "a", "/x/a.pt")
    assert found == {
        "step": 12,
        "start_seed": 3,
        "learning_rate": 1e-3,
        "architecture": "18",
        **(more | {"tags": '["x"]'}),
    }
    assert {key: type(value) for key, value in found.items()} == {
        "step": int,
        "start_seed": int,
        "learning_rate": float,
        "architecture": str,
        "depth": int,
        "score": float,
        "frozen": bool,
        "tags": str,
    }


def test_dates_become_text_that_can_be_queried(tmp_path: Path) -> None:
    rows = [{"path": "*", "day": datetime.date(2024, 5, 1)}]
    corpus = build(tmp_path, write(tmp_path / "facts.csv", rows))
    assert corpus.query(["day=2024-05-01"]).num_rows == 3


@pytest.mark.parametrize("suffix", ["csv", "json", "parquet"])
def test_a_file_without_the_column_path_is_refused(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"facts.{suffix}", [{"name": "a", "step": 1}])
    with pytest.raises(
        CorpusError,
        match=rf"facts\.{suffix}(, row 1)? has no column 'path' .it has name, step.; name by it the checkpoints",
    ):
        read_facts(path)


@pytest.mark.parametrize("column", ["checkpoint_id", "layout_id", "sha256", "shard", "row", "stored_id"])
def test_a_column_that_raywgen_sets_is_refused(tmp_path: Path, column: str) -> None:
    path = write(tmp_path / "facts.csv", [{"path": "a", column: "1"}])
    with pytest.raises(
        CorpusError, match=rf"facts\.csv: column '{column}' is set by raywgen itself; rename or drop it"
    ):
        read_facts(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("none.csv", None),
        ("empty.csv", b""),
        ("ragged.csv", b"path,step\na,1\nb\n"),
        ("bad.json", b"[{"),
        ("object.json", b'{"path": "a"}'),
        ("numbers.json", b"[1, 2]"),
        ("bad.parquet", b"PAR1 and no more"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=rf"{name}.*give "):
        read_facts(str(tmp_path / name))


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("step", "many", "whole number"),
        ("step", 1.5, "whole number"),
        ("step", True, "whole number"),
        ("step", 2**70, "whole number"),
        ("step", float("inf"), "whole number"),
        ("start_seed", [1], "whole number"),
        ("test_accuracy", "high", "number with a decimal point"),
        ("test_accuracy", "0,5", "number with a decimal point"),
        ("test_accuracy", False, "number with a decimal point"),
    ],
)
def test_a_wrong_number_is_named(tmp_path: Path, key: str, value: object, kind: str) -> None:
    path = write_json(tmp_path, [{"path": "*", key: value}])
    with pytest.raises(CorpusError, match=rf"facts\.json, row 1: {key}=.* is no {kind}; correct it"):
        read_facts(path)


def write_json(tmp_path: Path, rows: list[dict[str, Any]]) -> str:
    (tmp_path / "facts.json").write_text(json.dumps(rows))
    return str(tmp_path / "facts.json")


def test_a_fact_of_two_types_is_refused(tmp_path: Path) -> None:
    path = write_json(tmp_path, [{"path": "cnn/a", "depth": 4}, {"path": "cnn/b", "depth": "deep"}])
    with pytest.raises(CorpusError, match=r"'depth' is number in 'cnn/a' \(4\) and text in 'cnn/b' .*--as-text depth"):
        build(tmp_path, path)
