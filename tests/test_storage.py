"""Files on a disk and on a real S3 server behave alike."""

from __future__ import annotations

import hashlib
import threading
import time
from pathlib import Path

import pyarrow as pa
import pytest

from raywgen.config import ConfigError, read_yaml
from raywgen.inputs import UnusableFileError
from raywgen.locations import joined
from raywgen.storage import NoSuchFileError, Storage, StorageError, read_file


@pytest.fixture(params=["path", "file", "s3"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return f"{request.getfixturevalue('bucket')}/deep/folder"
    return str(tmp_path / "folder") if request.param == "path" else f"file://{tmp_path}/folder"


def test_files_are_written_listed_read_renamed_and_removed(location: str) -> None:
    storage = Storage.at(location)
    assert not storage.exists()
    assert not storage.walk()
    assert not storage.exists("a")
    assert storage.write("a/one.txt", b"one") == hashlib.sha256(b"one").hexdigest()
    with storage.open_output("a/deep/two.txt") as sink:
        sink.write(b"t")
        sink.write(b"wo")
    storage.write("three.txt", b"three")
    assert storage.walk() == ["a/deep/two.txt", "a/one.txt", "three.txt"]
    assert storage.walk("a") == ["a/deep/two.txt", "a/one.txt"]
    assert storage.list("a") == ["one.txt"]
    assert storage.exists()
    assert storage.exists("a")
    assert storage.exists("a/one.txt")
    assert not storage.exists("b")
    storage.move("a/one.txt", "a/deep/one.txt")
    assert storage.walk("a") == ["a/deep/one.txt", "a/deep/two.txt"]
    assert storage.read("a/deep/two.txt") == b"two"
    assert Storage.at(joined(location, "a/deep")).read("one.txt") == b"one"
    storage.delete("a")
    assert storage.walk() == ["three.txt"]
    with pytest.raises(NoSuchFileError, match=r"folder/a/one\.txt is missing; restore it"):
        storage.read("a/one.txt")


def test_a_file_that_fails_half_way_is_not_there(location: str) -> None:
    def stop(sink: pa.NativeFile) -> None:
        sink.write(b"half")
        raise KeyboardInterrupt

    storage = Storage.at(location)
    with pytest.raises(KeyboardInterrupt):
        storage.write_stream("a/one.txt", stop)
    assert storage.walk() == []


def test_folders_are_copied_both_ways(location: str, tmp_path: Path) -> None:
    storage, local = Storage.at(location), tmp_path / "local"
    (local / "in").mkdir(parents=True)
    (local / "in" / "one").write_bytes(b"1" * 5_000_000)
    (local / "two").write_bytes(b"")
    storage.upload(local, "tree")
    storage.upload(local / "in" / "one", "one")
    assert storage.walk() == ["one", "tree/in/one", "tree/two"]
    storage.download("tree", tmp_path / "back")
    storage.download("one", tmp_path / "back" / "more")
    files = {path.name: path.read_bytes() for path in (tmp_path / "back").rglob("*") if path.is_file()}
    assert files == {"one": b"1" * 5_000_000, "two": b"", "more": b"1" * 5_000_000}
    storage.upload(local, "")
    assert storage.walk("in") == ["in/one"]
    with pytest.raises(NoSuchFileError, match="folder/nothing is missing"):
        storage.download("nothing", tmp_path / "back")


def test_names_are_joined_before_the_query_of_a_uri() -> None:
    assert joined("runs/a/", "b") == "runs/a/b"
    assert joined("runs/why?", "b") == "runs/why?/b"
    assert joined("s3://bucket/a?region=eu-west-1", "b/c") == "s3://bucket/a/b/c?region=eu-west-1"


def test_a_bucket_that_is_not_there_is_one_clear_line(bucket: str) -> None:
    with pytest.raises(StorageError, match=r"cannot write s3://missing/run/a: .*not found.*run the same command again"):
        Storage.at("s3://missing/run").write("a", b"a")


def test_a_small_file_is_read_by_its_location(location: str) -> None:
    Storage.at(location).write("a/config.yaml", b"seed: 3\n")
    path = joined(location, "a/config.yaml")
    assert read_file(path, 8) == b"seed: 3\n"
    with pytest.raises(UnusableFileError, match=r"a/config\.yaml has 8 bytes, and at most 7 are read"):
        read_file(path, 7)
    with pytest.raises(FileNotFoundError):
        read_file(joined(location, "a/other.yaml"), 8)
    assert read_yaml(path) == {"seed": 3}
    with pytest.raises(ConfigError, match=r"a/other\.yaml does not exist"):
        read_yaml(joined(location, "a/other.yaml"))


def test_the_time_of_a_file_is_known(location: str) -> None:
    begin = time.time()
    Storage.at(location).write("a", b"a")
    written = Storage.at(location).modified("a")
    assert written is not None
    assert begin - 2 <= written <= time.time() + 2
    assert Storage.at(location).modified("b") is None


def test_a_local_folder_may_appear_and_vanish_while_it_is_listed(tmp_path: Path) -> None:
    storage, over = Storage.at(tmp_path), threading.Event()
    folder = tmp_path / "outer" / "inner"

    def come_and_go() -> None:
        while not over.is_set():
            folder.mkdir(parents=True)
            folder.rmdir()
            folder.parent.rmdir()

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        for _ in range(20_000):
            assert storage.list("outer/inner") == storage.walk("outer") == []
    finally:
        over.set()
        thread.join()
