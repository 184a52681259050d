"""Symbolic links: cycles end, the same file counts once, what leads nowhere is named."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from raywgen.corpus import CorpusError
from tests.field.builders import build, ids, net, reasons, same, save


def test_links_to_folders_that_are_listed_end_and_count_once(tmp_path: Path) -> None:
    root = tmp_path / "in"
    for run in (1, 2):
        save(root / f"run{run}/net.pt", net(run))
    os.symlink("run2", root / "latest")
    os.symlink("..", root / "run1/all")
    os.symlink("../..", root / "run2/above")
    os.symlink("loop", root / "loop")
    corpus = build(tmp_path, root)
    assert ids(corpus) == ["run1/net", "run2/net"]
    by_file = reasons(corpus)
    assert by_file.keys() == {"latest", "run1/all", "run2/above", "loop"}
    assert "is listed under another name" in by_file["latest"]
    assert "holds this folder" in by_file["run2/above"]
    assert "cannot be read" in by_file["loop"]


def test_a_glob_through_loops_ends_too(tmp_path: Path) -> None:
    save(tmp_path / "in/run/net.pt", net())
    for index in range(3):
        os.symlink("..", tmp_path / f"in/run/up{index}")
    assert ids(build(tmp_path, f"{tmp_path}/in/**/*.pt")) == ["run/net"]


def test_two_links_to_one_folder_outside_give_it_once(tmp_path: Path) -> None:
    save(tmp_path / "store/deep/net.pt", net())
    (tmp_path / "in").mkdir()
    os.symlink(tmp_path / "store/deep", tmp_path / "in/a")
    os.symlink(tmp_path / "store", tmp_path / "in/b")
    corpus = build(tmp_path, tmp_path / "in")
    assert ids(corpus) == ["a/net"]
    assert reasons(corpus).keys() == {"b/deep"}


def test_a_hub_cache_is_named_by_its_snapshots(tmp_path: Path) -> None:
    root = tmp_path / "in/models--lab--tiny"
    for revision, seed in (("aaa", 1), ("bbb", 2)):
        save(root / f"tmp{seed}.safetensors", net(seed)).rename(root / f"blob{seed}")
        (root / "snapshots" / revision).mkdir(parents=True)
        os.symlink(f"../../blob{seed}", root / f"snapshots/{revision}/model.safetensors")
    os.symlink("../../blob1", root / "snapshots/bbb/again.safetensors")
    os.symlink("../../gone", root / "snapshots/bbb/extra.safetensors")
    corpus = build(tmp_path, tmp_path / "in")
    names = ["models--lab--tiny/snapshots/aaa/model", "models--lab--tiny/snapshots/bbb/model"]
    # Of two links to one file either may name it.
    assert ids(corpus) == names
    for seed, name in enumerate(names, start=1):
        same(corpus, name, net(seed))
    by_file = reasons(corpus, "refused")
    assert list(by_file) == ["models--lab--tiny/snapshots/bbb/extra"]
    assert "is a link to ../../gone, which is not there" in by_file["models--lab--tiny/snapshots/bbb/extra"]
    with pytest.raises(CorpusError, match=r"1 checkpoints were refused.*is a link to"):
        build(tmp_path, tmp_path / "in", out="strict", strict=True)


def test_hard_links_are_files_of_their_own(tmp_path: Path) -> None:
    save(tmp_path / "in/a.pt", net())
    os.link(tmp_path / "in/a.pt", tmp_path / "in/b.pt")
    assert ids(build(tmp_path, tmp_path / "in")) == ["a", "b"]


def test_a_folder_given_twice_or_within_another_counts_once(tmp_path: Path) -> None:
    save(tmp_path / "in/run/net.pt", net())
    assert ids(build(tmp_path, tmp_path / "in", tmp_path / "in", tmp_path / "in/run")) == ["run/net"]


def test_pipes_names_that_are_no_text_and_hidden_folders_are_named(tmp_path: Path) -> None:
    save(tmp_path / "in/net.pt", net())
    save(tmp_path / "in/.old/net.pt", net())
    os.mkfifo(tmp_path / "in/pipe.pt")
    with open(os.fsencode(tmp_path / "in") + b"/bad\xff.pt", "wb") as file:
        file.write(b"x")
    corpus = build(tmp_path, tmp_path / "in")
    assert ids(corpus) == ["net"]
    by_file = list(reasons(corpus).values())
    assert len(by_file) == 3
    for part in ("pipe", "not UTF-8", "hidden folder"):
        assert any(part in reason for reason in by_file)


def test_a_file_mended_after_strict_is_taken(tmp_path: Path) -> None:
    for seed in range(3):
        save(tmp_path / f"in/n{seed}.pt", net(seed))
    bad = net(1)
    bad["fc.weight"][0, 0] = float("nan")
    save(tmp_path / "in/n1.pt", bad)
    with pytest.raises(CorpusError, match=r"n1\.pt.*NaN"):
        build(tmp_path, tmp_path / "in", strict=True)
    time.sleep(0.02)  # a coarse clock would give both the same time
    save(tmp_path / "in/n1.pt", net(1))
    corpus = build(tmp_path, tmp_path / "in", strict=True)
    same(corpus, "n1", net(1))
    assert ids(build(tmp_path, tmp_path / "in", strict=True)) == ["n0", "n1", "n2"]


def test_strict_refuses_a_corpus_that_was_built_without(tmp_path: Path) -> None:
    save(tmp_path / "in/a.pt", net())
    (tmp_path / "in/b.pt").write_bytes(b"none")
    build(tmp_path, tmp_path / "in")
    with pytest.raises(CorpusError, match=r"1 checkpoints were refused"):
        build(tmp_path, tmp_path / "in", strict=True)
