from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import boto3
import pytest
from typer.testing import CliRunner

from raywgen import out_folder
from raywgen.benchmarks.run import run
from raywgen.cli import app
from raywgen.out_folder import OutError, check_room, checked_out, local_file, local_out, local_path
from raywgen.storage import Storage, StorageError


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("", "out is empty; name a folder, such as out=runs/mine"),
        ("  ", "out is empty"),
        (".", "out=. is the current folder; name a folder of its own"),
        ("runs/..", "is the current folder"),
        ("/", "is the root of the file system"),
        ("file:///", "is the root of the file system"),
        ("~/runs", "begins with ~, which only a shell replaces"),
        ("ftp://host/run", "no URI of those that can be written to: s3://, gs://, hdfs://, file://"),
        ("hf://owner/name", "no URI of those that can be written to"),
        ("s3:/bucket/run", "is no path, and no URI"),
        ("s3://", "out=s3:// names no bucket or server"),
        ("hdfs://nowhere:1/run", "out=hdfs://nowhere:1/run: [^\n]*give a local path or a URI[^\n]*$"),
    ],
)
def test_folders_that_nobody_meant_are_refused(
    out: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutError, match=message):
        checked_out(out, "runs/mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]


def test_a_home_folder_and_a_file_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "file").touch()
    with pytest.raises(OutError, match="is a home folder"):
        checked_out(tmp_path / "home", "runs/mine")
    with pytest.raises(OutError, match="is a file; name a folder"):
        checked_out(tmp_path / "file", "runs/mine")


def test_a_current_folder_that_was_deleted_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray unpacks a job's working directory again while its driver runs, where several nodes share a machine."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert checked_out(tmp_path / "run", "runs/digits") == str(tmp_path / "run")


def test_a_file_uri_is_a_path(tmp_path: Path) -> None:
    assert checked_out(f"file://{tmp_path}/run", "runs/mine") == str(tmp_path / "run")
    assert checked_out("runs/a:b", "runs/mine") == "runs/a:b"
    assert not (tmp_path / "run").exists()


def test_a_store_is_tried_before_anything_runs(bucket: str) -> None:
    assert checked_out(f"{bucket}/run", "runs/mine") == f"{bucket}/run"
    names = [row["Key"] for row in boto3.client("s3").list_objects_v2(Bucket="bucket")["Contents"]]
    assert [name for name in names if not name.endswith("/")] == []
    with pytest.raises(OutError, match=r"out=s3://missing/run cannot be written to: there is no such bucket"):
        checked_out("s3://missing/run", "runs/mine")


def test_wrong_credentials_are_one_line(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = boto3.client("iam")
    client.create_user(UserName="nobody")
    key = client.create_access_key(UserName="nobody")["AccessKey"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
    # From here on the server asks for permissions, and this user has none.
    monkeypatch.setattr("moto.settings.INITIAL_NO_AUTH_ACTION_COUNT", 0)
    with pytest.raises(OutError, match="the credentials are missing or wrong, or do not allow it"):
        checked_out(f"{bucket}/run", "runs/mine")
    with pytest.raises(StorageError, match=r"^s3://bucket/run cannot be read \(.*check the URI, the credentials"):
        Storage.at(f"{bucket}/run").size("config.yaml")
    monkeypatch.undo()


def test_a_store_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out_folder, "_MOST_SECONDS", 0.5)
    with pytest.raises(OutError, match="the store does not answer"):
        checked_out("s3://bucket/run?endpoint_override=127.0.0.1:1&scheme=http&region=us-east-1", "runs/mine")


def test_what_goes_to_a_local_path_takes_no_uri() -> None:
    assert local_out("runs/head.safetensors", "a", "adapt") == "runs/head.safetensors"
    with pytest.raises(OutError, match="out=s3://bucket/head is a URI, and adapt writes to a local path only"):
        local_out("s3://bucket/head", "head.safetensors", "adapt")
    with pytest.raises(OutError, match="out is empty"):
        local_out("", "head.safetensors", "adapt")


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    assert local_file(tmp_path / "head.safetensors", "a", "adapt") == str(tmp_path / "head.safetensors")
    with pytest.raises(OutError, match=f"out={tmp_path} is a folder; name a file, such as out=head.safetensors"):
        local_file(tmp_path, "head.safetensors", "adapt")
    with pytest.raises(OutError, match="begins with ~, which only a shell replaces"):
        local_file("~/head.safetensors", "head.safetensors", "adapt")


def test_a_path_may_be_a_file_or_a_folder_that_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "head.safetensors").touch()
    for path in (tmp_path, tmp_path / "head.safetensors", tmp_path / "new"):
        assert local_path(path, "a", "adapt") == str(path)
    monkeypatch.chdir(tmp_path)
    for out, message in ((".", "is the current folder"), ("s3://bucket/a", "is a URI"), ("~/a", "begins with ~")):
        with pytest.raises(OutError, match=message):
            local_path(out, "a", "adapt")


COMMANDS = {
    command: command.split()
    for command in (
        "adapt runs/none --support none.npz out=OUT",
        "cluster render igpg --into OUT",
        "corpus align runs/none OUT",
        "corpus build OUT --from none",
        "corpus compress runs/none OUT",
        "corpus decompress runs/none OUT",
        "corpus dedupe runs/none OUT",
        "corpus encode runs/none tokenizer=runs/none out=OUT",
        "corpus export runs/none OUT",
        "corpus filter runs/none OUT",
        "corpus merge OUT runs/none",
        "corpus split runs/none OUT",
        "demo out=OUT",
        "encoder train omniglot out=OUT",
        "evaluate out=OUT",
        "export runs/none out=OUT",
        "finetune out=OUT",
        "generate out=OUT",
        "retrieve runs/none out=OUT",
        "select runs/none out=OUT",
        "statistics none.safetensors data=none.npy out=OUT",
        "train mcdi num_workers=0 out=OUT",
        "tune mcdi out=OUT",
        "zoo train out=OUT",
    )
}
FILES = ("retrieve", "select", "statistics")  # `adapt` writes either, and only its generator tells which.


def refusal(command: list[str], out: str) -> str:
    refused = CliRunner().invoke(app, [part.replace("OUT", out) for part in command])
    assert isinstance(refused.exception, OutError), refused.output
    return str(refused.exception)


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_every_command_refuses_a_store_before_it_reads_anything(
    command: list[str], bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = refusal(command, "s3://missing/run")
    assert "there is no such bucket" in message or "to a local path only" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_every_command_refuses_folders_that_nobody_meant_before_it_reads_anything(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    here = tmp_path / "home" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    places = {".": "is the current folder", "/": "is the root of the file system", "..": "is a home folder"}
    for out, reason in places.items():
        expected = "is a folder; name a file" if command[0] in FILES else reason
        assert f"={out} {expected}" in refusal(command, out)
    assert "begins with ~" in refusal(command, "~/mine")
    assert not list(here.iterdir())


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_every_command_refuses_a_full_disk_before_it_reads_anything(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    assert "cannot be written: its disk is full; free some disk space" in refusal(command, str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_a_benchmark_refuses_a_uri_and_the_current_folder() -> None:
    with pytest.raises(OutError, match="benchmark tune writes to a local path only"):
        run(["tune", "out=s3://bucket/tune"])
    with pytest.raises(OutError, match=r"out=\. is the current folder"):
        run(["tune", "out=."])


def test_a_disk_without_room_is_noticed_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def have(free: int) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free if path.exists() else None))

    out = str(tmp_path / "new/runs")
    have(0)
    with pytest.raises(OutError, match=r"^out=.*new/runs cannot be written: its disk is full; free some disk space"):
        checked_out(out, "runs/mine")
    have(3 << 20)
    assert checked_out(out, "runs/mine") == out
    check_room(out, 3 << 20)
    with pytest.raises(
        OutError, match=r"is to hold at least 4\.0 MiB, and its disk has 3\.0 MiB left; free some disk space"
    ):
        check_room(out, 4 << 20)
    with pytest.raises(OutError, match=r"at least 4\.0 MiB for 2 trials, and its disk"):
        check_room(out, 4 << 20, "for 2 trials")
    # What an earlier run wrote is a part of it.
    Path(out).mkdir(parents=True)
    (Path(out) / "part").write_bytes(bytes(1 << 20))
    check_room(out, 4 << 20)
    check_room("s3://bucket/out", 1 << 60)
