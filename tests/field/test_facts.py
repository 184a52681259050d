"""Tables of facts as people write them: none is dropped or altered without a word."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from raywgen.cli import app
from raywgen.corpus import Corpus, CorpusError, UnknownFactError
from raywgen.corpus.build import BuildConfig, build_corpus
from raywgen.corpus.facts_file import read_facts
from raywgen.corpus.merge import merge

NAMES = ("a/final", "b/final", "run[1]/net", "c d/net")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index, name in enumerate(NAMES):
        path = tmp_path / "nets" / f"{name}.pt"
        path.parent.mkdir(parents=True)
        torch.save({"weight": torch.randn(3, 2, generator=torch.Generator().manual_seed(index))}, path)
    return tmp_path / "nets"


def build(folder: Path, facts: str | bytes, name: str = "facts.csv", **settings: Any) -> tuple[Corpus, list[str]]:
    """The corpus of a folder with a file of facts, and what was said of the file."""
    path = folder.parent / name
    path.write_bytes(facts if isinstance(facts, bytes) else facts.encode())
    notices: list[str] = []
    out = folder.parent / f"corpus-{len(list(folder.parent.iterdir()))}"
    config = BuildConfig(out=str(out), sources=[str(folder)], facts=str(path), distributed=False, **settings)
    return build_corpus(config, on_notice=notices.append), notices


def column(corpus: Corpus, fact: str) -> list[Any]:
    """A fact of all checkpoints, in the order of `NAMES`."""
    rows = {row["checkpoint_id"]: row.get(fact) for row in corpus.facts.to_pylist()}
    return [rows[name] for name in NAMES]


def test_a_spreadsheets_csv_tells_all_it_holds(folder: Path) -> None:
    lines = ["path,task_id,test_accuracy,wandb_id"]
    lines += [f"{name}.pt,{7 + index:03d},0.{5 + index},{12 + index:04d}" for index, name in enumerate(NAMES)]
    corpus, notices = build(folder, "\ufeff" + "\r\n".join(lines) + "\r\n")
    assert column(corpus, "task_id") == ["007", "008", "009", "010"]
    assert column(corpus, "wandb_id") == ["0012", "0013", "0014", "0015"]
    assert column(corpus, "test_accuracy") == [0.5, 0.6, 0.7, 0.8]
    assert [text.rpartition(": ")[2] for text in notices] == ["4 of 4 rows are used"]


@pytest.mark.parametrize(
    "path",
    ["a/final", "a/final.pt", "./a/final.pt", " a/final", "a\\final.pt", "a", "nets/a/final.pt", "nets\\a\\final"],
)
def test_a_checkpoint_is_known_by_all_that_people_call_it(folder: Path, path: str) -> None:
    corpus, _ = build(folder, f"path,mark\n{path},x\n")
    assert column(corpus, "mark") == ["x", None, None, None]


def test_an_absolute_path_names_its_file(folder: Path) -> None:
    corpus, _ = build(folder, f"path,mark\n{folder}/b/final.pt,x\n")
    assert column(corpus, "mark") == [None, "x", None, None]


def test_a_name_is_taken_literally_before_it_is_a_pattern(folder: Path) -> None:
    torch.save({"weight": torch.randn(3, 2)}, folder / "run1.pt")
    (folder / "run1").mkdir()
    torch.save({"weight": torch.randn(3, 2)}, folder / "run1" / "net.pt")
    corpus, _ = build(folder, "path,mark\nrun[1]/net,x\n")
    assert corpus.query(["mark=x"]).column("checkpoint_id").to_pylist() == ["run[1]/net"]


@pytest.mark.parametrize("pattern", ["*/final", "*/final.pt", "?\\final.pt", "[ab]/final"])
def test_a_pattern_names_many(folder: Path, pattern: str) -> None:
    corpus, _ = build(folder, f"path,mark\n{pattern},x\n")
    assert column(corpus, "mark") == ["x", "x", None, None]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("nosuch/net,1", "row 2: 'nosuch/net' fits no checkpoint; its facts are not used"),
        ("nosuch/*,1", "row 2: 'nosuch/*' fits no checkpoint; its facts are not used"),
        (",1", "row 2: names no path; its facts are not used"),
        ("final.pt,1", "row 2: 'final.pt' fits 2 checkpoints (a/final, b/final); its facts are not used"),
        ("a/final,1\na/final.pt,2", "rows 2 and 3 say mark=1 and mark=2 of 'a/final'; the later one counts"),
        ("a/*,1\n*,2", "rows 2 and 3 say mark=1 and mark=2 of 'a/final'; the later one counts"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_before_the_work_and_can_be_fatal(
    folder: Path, rows: str, said: str
) -> None:
    corpus, notices = build(folder, f"path,mark\n{rows}\n")
    assert any(said in text for text in notices)
    assert any(said in text for text in corpus.manifest["recipe"]["facts_report"]["problems"])
    with pytest.raises(CorpusError, match=r"facts\.csv: 1 rows cannot be used as they stand, first row"):
        build(folder, f"path,mark\n{rows}\n", strict_facts=True)


def test_a_wide_pattern_may_be_corrected_by_a_narrow_one_or_a_name(folder: Path) -> None:
    corpus, notices = build(folder, "path,mark\n*,1\na/*,2\nb/final,3\n", strict_facts=True)
    assert column(corpus, "mark") == [2, 3, 1, 1]
    assert len(notices) == 1


def test_the_command_line_says_which_rows_are_not_used(folder: Path) -> None:
    (folder.parent / "facts.csv").write_text("path,mark\nnosuch,1\na/final,2\n")
    command = ["corpus", "build", str(folder.parent / "c"), "--from", str(folder), "--here"]
    command += ["--facts", str(folder.parent / "facts.csv")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0
    assert "1 of 2 rows are used" in result.stderr
    assert "row 2: 'nosuch' fits no checkpoint" in result.stderr


TEXTS = [
    "007",
    "1e5",
    "True",
    "2024-01-02",
    "NA",
    "",
    "1.10",
    "-0",
    str(2**64),
    "nan",
    "+1",
    "a,b",
    'x"y',
    "two\nlines",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_of_a_csv_stays_text(folder: Path, text: str) -> None:
    quoted = text.replace('"', '""')
    corpus, _ = build(folder, f'path,note\na/final,"{quoted}"\nb/final,\n')
    assert column(corpus, "note") == [text, None, None, None]


def test_a_column_becomes_numbers_only_where_they_give_back_every_cell(folder: Path) -> None:
    lines = ["path,whole,real,id,padded,nan", "a/final,3,0.5,12,0.50,1.5", "b/final,-4,1e-05,0013,0.75,NaN"]
    corpus, _ = build(folder, "\n".join(lines))
    assert column(corpus, "whole")[:2] == [3, -4]
    assert column(corpus, "real")[:2] == [0.5, 1e-05]
    assert column(corpus, "id")[:2] == ["12", "0013"]
    assert column(corpus, "padded")[:2] == ["0.50", "0.75"]
    assert column(corpus, "nan")[0] == 1.5
    assert math.isnan(column(corpus, "nan")[1])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("f.csv", "path;mark\na/final;x\n"),
        ("f.csv", "path\tmark\na/final\tx\n"),
        ("f.csv", " path , mark \na/final,x\n"),
        ("f.csv", "path,mark\ra/final,x\r"),
        ("f.csv", "path,mark\na/final,x\n".encode("utf-16")),
        ("f.tsv", "path\tmark\na/final\tx\n"),
        ("f.jsonl", '\ufeff{"path": "a/final", "mark": "x"}\r\n\r\n{"path": "b/final"}\r\n'),
        ("f.json", '\ufeff[{"path": "a/final", "mark": "x"}]'),
        ("F.JSON", '[{"path": "a/final", "mark": "x"}, {"path": "b/final", "mark": NaN}]'),
    ],
)
def test_every_usual_form_of_table_is_read(folder: Path, name: str, content: str | bytes) -> None:
    corpus, _ = build(folder, content, name)
    assert column(corpus, "mark") == ["x", None, None, None]


def test_a_parquet_file_is_read(folder: Path) -> None:
    pq.write_table(pa.table({"path": ["a/final", "b/final"], "mark": ["007", None]}), folder.parent / "f.parquet")
    corpus, _ = build(folder, (folder.parent / "f.parquet").read_bytes(), "f.parquet")
    assert column(corpus, "mark") == ["007", None, None, None]


def test_nested_values_huge_numbers_and_booleans_of_json_are_kept(folder: Path) -> None:
    row = {"path": "a/final", "config": {"lr": 0.1, "über": [1, None]}, "huge": 2**70, "done": True, "n": 2**53 + 1}
    corpus, _ = build(folder, json.dumps([row]), "f.json")
    assert json.loads(column(corpus, "config")[0]) == row["config"]
    assert column(corpus, "huge")[0] == str(2**70)
    assert column(corpus, "done")[0] is True
    assert column(corpus, "n")[0] == 2**53 + 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("f.csv", b"path,mark\na/final,\xe9\n", r"f\.csv is not UTF-8 \(line 2\); save it as UTF-8"),
        ("f.csv", "path,mark,mark\na,1,2\n", r"f\.csv: column 'mark' is there twice"),
        ("f.csv", "path, mark,mark\na,1,2\n", r"f\.csv: column 'mark' is there twice"),
        ("f.csv", ",path\n0,a\n", r"f\.csv: column 1 has no name.*to_csv\(index=False\)"),
        ("f.csv", "Path,mark\na,1\n", r"f\.csv has no column 'path' \(it has Path, mark\)"),
        ("f.csv", "path,sha256\na,1\n", r"f\.csv: column 'sha256' is set by raywgen itself"),
        ("f.csv", "path;test_accuracy\na;0,5\n", r"row 2: test_accuracy='0,5' is no number with a decimal point"),
        ("f.csv", "path,test_accuracy\na,NA\n", r"row 2: test_accuracy='NA' is no number.*leave it empty"),
        ("f.csv", "", r"f\.csv is empty"),
        ("f.json", '[{"path": "a", "x": 1, "x": 2}]', r"f\.json: an object names 'x' twice"),
        ("f.json", '{"path": "a"}\n{"path": "b"}', r"f\.json cannot be read .*Extra data.*give .*\.jsonl"),
        ("f.jsonl", '{"path": "a"}\nb\n', r"f\.jsonl, line 2 is no JSON"),
        ("f.jsonl", "[1]\n", r"holds no list of objects"),
        ("f.xlsx", "PK", r"f\.xlsx is of no known kind; give \.csv"),
    ],
)
def test_a_table_that_cannot_be_read_as_it_stands_is_refused_in_one_line(
    folder: Path, name: str, content: str | bytes, message: str
) -> None:
    with pytest.raises(CorpusError, match=message):
        build(folder, content, name)
    assert not list(folder.parent.glob("corpus-*/*"))


def test_a_header_without_rows_is_said(folder: Path) -> None:
    _, notices = build(folder, "path,mark\n")
    assert "0 of 0 rows are used" in notices[0]


@pytest.mark.parametrize(
    ("term", "found"),
    [
        ("eval/accuracy>0.6", ["n1", "n2"]),
        ("val acc>1", ["n1", "n2"]),
        ("val acc > 1", ["n1", "n2"]),
        ('"val acc">1', ["n1", "n2"]),
        ("lr-max>0.15", ["n1", "n2"]),
        ("layer.count>3", ["n1", "n2"]),
        ("group=a,b", ["n0", "n2"]),
        ('group="a,b"', ["n1"]),
        ('group="a,b",b', ["n1", "n2"]),
        ('group!="a,b"', ["n0", "n2"]),
        ("group~a*", ["n0", "n1"]),
        ("when>2024-01-02", ["n1", "n2"]),
        ('"p(y=1)"<0.4', ["n0", "n1"]),
        ('"say ""hi"""=x', ["n0"]),
        ("id>9", ["n1", "n2"]),
        ("id=09", ["n0"]),
        ("checkpoint_id = n1", ["n1"]),
    ],
)
def test_columns_of_any_name_can_be_queried(tmp_path: Path, term: str, found: list[str]) -> None:
    (tmp_path / "nets").mkdir()
    for index in range(3):
        save_file({"weight": torch.full((2, 2), float(index))}, tmp_path / "nets" / f"n{index}.safetensors")
    header = 'path,eval/accuracy,val acc,lr-max,group,layer.count,when,p(y=1),"say ""hi""",id'
    rows = ["n0,0.5,1,0.1,a,3,2024-01-02,0.2,x,09", 'n1,0.7,2,0.2,"a,b",4,2024-01-03,0.3,y,10']
    rows += ["n2,0.9,3,0.3,b,5,2024-01-04,0.4,z,11"]
    corpus, _ = build(tmp_path / "nets", "\n".join([header, *rows]))
    assert corpus.query([term]).column("checkpoint_id").to_pylist() == found


def test_text_is_not_compared_with_numbers(folder: Path) -> None:
    corpus, _ = build(folder, "path,fold\na/final,1\nb/final,b\n")
    with pytest.raises(CorpusError, match=r"'fold>0': this fact is text, such as 'b'"):
        corpus.query(["fold>0"])


@pytest.fixture
def two(tmp_path: Path) -> list[Corpus]:
    """Two people's corpora: a fact `fold` of numbers in one and of text in the other."""
    corpora = []
    for who, cells in (("x", "12"), ("y", "ab")):
        (tmp_path / f"in-{who}").mkdir()
        for index in range(2):
            save_file({"weight": torch.randn(2, 2)}, tmp_path / f"in-{who}" / f"{who}{index}.safetensors")
        (tmp_path / f"{who}.csv").write_text(f"path,fold\n{who}0,{cells[0]}\n{who}1,{cells[1]}\n")
        sources, facts = [str(tmp_path / f"in-{who}")], str(tmp_path / f"{who}.csv")
        corpora.append(
            build_corpus(BuildConfig(out=str(tmp_path / who), sources=sources, facts=facts, distributed=False))
        )
    return corpora


def test_facts_of_two_types_are_refused_before_the_work_and_joined_as_text(two: list[Corpus], tmp_path: Path) -> None:
    message = r"'fold' is number in .*x \(1\) and text in .*y \('a'\).*`--as-text fold`"
    with pytest.raises(CorpusError, match=message):
        merge(str(tmp_path / "both"), two)
    sources = [corpus.location for corpus in two]
    with pytest.raises(CorpusError, match=message):
        build_corpus(BuildConfig(out=str(tmp_path / "both"), sources=sources, distributed=False))
    assert not (tmp_path / "both").exists()
    merged = merge(str(tmp_path / "both"), two, as_text=["fold"])
    assert sorted(merged.facts.column("fold").to_pylist()) == ["1", "2", "a", "b"]
    config = BuildConfig(out=str(tmp_path / "built"), sources=sources, as_text=["fold"], distributed=False)
    assert sorted(build_corpus(config).facts.column("fold").to_pylist()) == ["1", "2", "a", "b"]


def test_the_command_that_merge_names_exists(two: list[Corpus], tmp_path: Path) -> None:
    command = ["corpus", "merge", str(tmp_path / "both"), *(corpus.location for corpus in two), "--as-text", "fold"]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert Corpus.open(tmp_path / "both").query(["fold=1,a"]).num_rows == 2


def test_only_facts_of_ones_own_become_text(two: list[Corpus], tmp_path: Path) -> None:
    with pytest.raises(UnknownFactError, match="no corpus has a fact 'folds'"):
        merge(str(tmp_path / "both"), two, as_text=["folds"])
    with pytest.raises(CorpusError, match="fact 'step' has a type of its own"):
        merge(str(tmp_path / "both"), two, as_text=["step"])


def test_one_corpus_may_hold_whole_numbers_and_another_fractions(two: list[Corpus], tmp_path: Path) -> None:
    (tmp_path / "z.csv").write_text("path,fold\ny0,0.5\ny1,2.0\n")
    config = BuildConfig(
        out=str(tmp_path / "z"), sources=[str(tmp_path / "in-y")], facts=str(tmp_path / "z.csv"), distributed=False
    )
    merged = merge(str(tmp_path / "both"), [two[0], build_corpus(config)])
    assert sorted(merged.facts.column("fold").to_pylist()) == [0.5, 1.0, 2.0, 2.0]


def test_rows_of_large_tables_are_joined_by_look_up(tmp_path: Path) -> None:
    from raywgen.corpus.facts_join import join_facts
    from raywgen.corpus.sources import SourceCheckpoint

    names = [f"run-{index // 10}/checkpoint-{index}/model" for index in range(3_000)]
    checkpoints = [SourceCheckpoint(name=name, files=(f"/x/{name}.pt",), num_bytes=1) for name in names]
    (tmp_path / "f.csv").write_text("path,mark\n" + "".join(f"x/{name}.pt,m{i}\n" for i, name in enumerate(names)))
    joined, report = join_facts(read_facts(str(tmp_path / "f.csv")), checkpoints)
    assert [checkpoint.facts["mark"] for checkpoint in joined] == [f"m{index}" for index in range(3_000)]
    assert not report.problems
