"""Leases on folders of an object store, held by real processes on a real S3 server."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

from raywgen import leases
from raywgen.locks import LOCK, InUseError, only_one
from raywgen.storage import Storage
from tests.lock_holder import lock_holder


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "BEAT_SECONDS", 0.5)
    monkeypatch.setattr(leases, "SETTLE_SECONDS", 0.1)
    monkeypatch.setattr(leases, "STALE_SECONDS", 3.0)


def test_a_folder_in_use_is_refused_and_free_when_its_holder_is_killed(bucket: str) -> None:
    folder = f"{bucket}/run"
    with lock_holder(folder) as holder:
        with pytest.raises(InUseError, match=rf"^{folder} is in use: `-c {folder}` \(process {holder.pid} on "):
            only_one(folder).__enter__()
        holder.kill()
        holder.wait()
        with only_one(folder):
            assert json.loads(Storage.at(folder).read(LOCK))["pid"] != holder.pid
    assert not Storage.at(folder).walk()


def test_a_holder_elsewhere_that_gives_no_sign_of_life_loses_its_lease(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = f"{bucket}/run"
    with lock_holder(folder) as holder:
        time.sleep(0.05)  # Most likely between two beats: in the middle of one it would write once more.
        holder.send_signal(signal.SIGSTOP)
        row = json.loads(Storage.at(folder).read(LOCK))
        Storage.at(folder).write(LOCK, json.dumps(row | {"machine": "another"}).encode())
        monkeypatch.setattr(leases, "STALE_SECONDS", 0.5)
        with only_one(folder):
            holder.send_signal(signal.SIGCONT)
            assert holder.wait(10) != 0  # It finds its lease taken, and stops.
            assert json.loads(Storage.at(folder).read(LOCK))["pid"] != holder.pid
    assert not Storage.at(folder).walk()


def test_of_two_that_begin_at_once_one_gives_way(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = f"{bucket}/run"
    storage = Storage.at(folder)

    def settle(seconds: float) -> None:
        storage.write(LOCK, json.dumps({"command": "other", "pid": 1, "host": "b", "since": "now"}).encode())

    monkeypatch.setattr("time.sleep", settle)
    with pytest.raises(InUseError, match=r"`other` \(process 1 on b"):
        only_one(folder).__enter__()
    assert b"other" in storage.read(LOCK)


def test_a_damaged_lease_is_taken_over(bucket: str) -> None:
    folder = f"{bucket}/run"
    Storage.at(folder).write(LOCK, b"{")
    with only_one(folder):
        assert json.loads(Storage.at(folder).read(LOCK))["pid"] == os.getpid()
    assert not Storage.at(folder).walk()
