"""A disk that fills up while a corpus is written: one clear error, and earlier results stay as they were.

The limits are the system's own: a file-size limit of the process, and a small tmpfs where mounting is allowed.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from raywgen.corpus import Corpus, CorpusError, verify_corpus
from raywgen.weights import Layout
from tests.corpus import builders
from tests.limits import file_size_limit

REPOSITORY = Path(__file__).parents[2]
WRITE_UNTIL_FULL = """
import sys
from raywgen.corpus import CorpusError
from tests.corpus import builders
root = sys.argv[1]
builders.small_corpus(root)
try:
    builders.shard(root, "a-narrow", builders.states("other", 5000, 2, 9000))
except CorpusError as error:
    print(error)
"""


def listing(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


def test_shard_that_does_not_fit(tmp_path: Path) -> None:
    builders.small_corpus(tmp_path)
    before = listing(tmp_path)
    with file_size_limit(4096), pytest.raises(CorpusError, match=r"a-narrow\.arrow.*free some disk space.*again"):
        builders.shard(tmp_path, "a-narrow", builders.states("other", 300, 2, 9000))
    assert listing(tmp_path) == before
    assert verify_corpus(tmp_path) == []


@pytest.mark.parametrize(("limit", "stopped_at"), [(200, "checkpoints"), (100_000, "manifest.json")])
def test_commit_that_does_not_fit_leaves_the_earlier_corpus(tmp_path: Path, limit: int, stopped_at: str) -> None:
    corpus, states = builders.small_corpus(tmp_path)
    before = listing(tmp_path)
    extra = builders.shard(tmp_path, "z-extra", builders.states("extra", 2, 2, 7000))
    added = listing(tmp_path).keys() - before.keys()
    layouts = [Layout.from_state_dict(builders.network(2, 0))]
    # Many networks, so that the manifest is the longest file and fails after the facts were written.
    with (
        file_size_limit(limit),
        pytest.raises(CorpusError, match=rf"cannot write .*{stopped_at}.*free some disk space"),
    ):
        builders.commit(tmp_path, [extra], layouts * 10_000)
    assert listing(tmp_path).keys() - added == before.keys()
    assert all(listing(tmp_path)[name] == digest for name, digest in before.items())
    assert verify_corpus(tmp_path) == []
    builders.assert_same_bits(Corpus.open(tmp_path).state_dict("wide1"), states["wide1"])
    assert corpus.facts.num_rows == 608


@pytest.mark.skipif(
    sys.platform != "linux"
    or subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode != 0,
    reason="needs Linux user namespaces, to mount a small tmpfs",
)
def test_disk_without_space(tmp_path: Path) -> None:
    mount_and_write = 'mount -t tmpfs -o size=256k tmpfs "$1" && "$2" -c "$3" "$1" && find "$1" -type f -printf "%P\n"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount_and_write, "sh", str(tmp_path), sys.executable, WRITE_UNTIL_FULL],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    message, *files = done.stdout.splitlines()
    assert "a-narrow.arrow: " in message, done.stderr
    assert "No space left" in message
    assert "free some disk space and run the same command again" in message
    assert sorted(files) == [
        "checkpoints.parquet",
        "manifest.json",
        "tasks.parquet",
        *(f"weights/{name}.arrow" for name in ("a-narrow", "b-wide", "c-held", "d-base")),
    ]


def test_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "corpus").write_text("in the way")
    with pytest.raises(CorpusError, match=r"cannot write .*corpus.*check the folder and its permissions"):
        builders.shard(tmp_path / "corpus", "a", builders.states("net", 1, 2, 0))
