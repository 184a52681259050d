from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from raywgen.files import in_one_step, write_text

# A real limit on the size of files: the write breaks off in its middle, as on a full disk.
_ON_A_FULL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
from raywgen.files import write_text
try:
    write_text(sys.argv[1], "new" * 10_000)
except OSError as error:
    print(error.filename, error.strerror)
"""


def test_a_full_disk_leaves_the_old_text_and_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "generator.json"
    write_text(path, "old")
    done = subprocess.run(
        [sys.executable, "-c", _ON_A_FULL_DISK, str(path)], capture_output=True, text=True, timeout=120, check=True
    )
    assert (
        done.stdout
        == f"{path} File too large; free some disk space or raise the quota and run the same command again\n"
    )
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_text_appears_at_the_end_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with in_one_step(path) as partial:
        partial.write_text("né")
        assert path.read_text() == "old"
    assert path.read_text(encoding="utf-8") == "né"
    with suppress(KeyError), in_one_step(path) as partial:
        partial.write_text("half")
        raise KeyError
    assert path.read_text(encoding="utf-8") == "né"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_it_has_its_name_and_its_name_before_it_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    acts: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        acts.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def named(self: Path, target: Path) -> Path:
        acts.append(f"name {self.name}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", named)
    write_text(tmp_path / "progress.json", "{}")
    partial = f".progress.json.{os.getpid()}"
    assert acts == [f"sync {partial}", f"name {partial}", f"sync {tmp_path.name}"]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="check the folder and its permissions") as caught:
        write_text(tmp_path / "none" / "a.txt", "text")
    assert caught.value.filename == str(tmp_path / "none" / "a.txt")
