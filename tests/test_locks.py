from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from raywgen.locks import LOCK, InUseError, only_one, waiting
from tests.lock_holder import lock_holder


def refusal(folder: Path) -> str:
    with pytest.raises(InUseError) as refused:
        only_one(folder).__enter__()
    return str(refused.value)


def test_a_folder_in_use_is_refused_and_its_holder_named(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    with lock_holder(folder) as holder:
        for _ in range(2):  # A process that is refused does not overwrite what the holder wrote about itself.
            message = refusal(folder)
            process = f"(process {holder.pid} on {os.uname().nodename}, since 20"
            assert message.startswith(f"{folder} is in use: `-c {folder}` {process}")
            assert message.endswith("wait until it has ended, or give another out")
        with only_one(tmp_path / "runs" / "b"):
            pass


def test_a_holder_that_is_killed_frees_the_folder(tmp_path: Path) -> None:
    with lock_holder(tmp_path) as holder:
        holder.kill()
        holder.wait()
        with only_one(tmp_path):
            assert f'"pid": {os.getpid()}' in (tmp_path / LOCK).read_text()
    assert (tmp_path / LOCK).read_text() == ""
    with only_one(tmp_path):
        pass


def test_an_error_frees_the_folder(tmp_path: Path) -> None:
    with pytest.raises(KeyError), only_one(tmp_path):
        raise KeyError
    with only_one(tmp_path):
        pass


def test_who_waits_has_its_turn_afterwards(tmp_path: Path) -> None:
    order: list[str] = []

    def second() -> None:
        with waiting(tmp_path / "it.lock"):
            order.append("second")

    with waiting(tmp_path / "it.lock"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.1)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_a_folder_that_cannot_be_made_is_named_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="check the folder and its permissions") as refused:
        only_one(tmp_path / "file").__enter__()
    assert refused.value.filename == str(tmp_path / "file")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_used_with_a_warning(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    for _ in range(2):  # The first one leaves nothing behind that would stop the second.
        with (
            pytest.warns(UserWarning, match=f"the file system of {tmp_path} does not support locks"),
            only_one(tmp_path),
        ):
            assert (tmp_path / LOCK).read_text() == ""
