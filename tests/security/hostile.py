"""Bundles and corpora of somebody else's, who would like to run code here or to hear from here."""

from __future__ import annotations

import dataclasses
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from raywgen.corpus import Corpus
from raywgen.corpus.describe import describe
from raywgen.generators.bundle import build_generator, save_bundle
from raywgen.sealed import sealed_json, unseal
from raywgen.training.data import data_spec, measure_normalizers
from tests.builders import igpg_config

NETWORK = "mlp-64-6-2"
_PAYLOAD = """
from pathlib import Path
from torch import nn

MARK = Path({mark!r})
MARK.open("a").write("imported ")

class Net(nn.Sequential):
    def __init__(self) -> None:
        MARK.open("a").write("built ")
        super().__init__(nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 2))

def function(**arguments: object) -> nn.Module:
    MARK.open("a").write("called ")
    return Net()
"""


@dataclasses.dataclass(frozen=True)
class Payload:
    """A module that leaves a mark when it is imported, and when something in it is called."""

    name: str
    mark: Path

    @property
    def has_run(self) -> str:
        return self.mark.read_text() if self.mark.exists() else ""


def make_payload(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Payload:
    """The module lies where Python finds it, under a name that no other test has imported."""
    name, mark = f"payload_{folder.name.replace('-', '_')}", folder / "mark"
    (folder / f"{name}.py").write_text(_PAYLOAD.format(mark=str(mark)))
    monkeypatch.syspath_prepend(folder)
    return Payload(name, mark)


def make_bundle(corpus: Corpus, folder: Path) -> Path:
    """A generator of a corpus' networks, without any training."""
    generator = build_generator("igpg", igpg_config(), measure_normalizers(corpus), data_spec(corpus), 0)
    save_bundle(generator, folder, {"corpus": corpus.location})
    return folder


def change_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes a JSON file and gives it the checksum that belongs to it, as its author can."""
    content = unseal(path.read_bytes(), is_required=False)
    change(content)
    content.pop("files", None) if path.name == "generator.json" else None
    path.write_text(sealed_json(content))


def hostile_corpus(
    corpus: Corpus, folder: Path, *, network: dict[str, Any] | None = None, task: dict[str, Any] | None = None
) -> Corpus:
    """A copy whose recipes of a network or of all tasks are others."""
    shutil.copytree(corpus.location, folder)
    tasks = [] if task is None else [dataclasses.replace(each, recipe=task) for each in corpus.tasks.values()]
    return describe(folder, tasks, {} if network is None else {NETWORK: network})


@contextmanager
def listening() -> Iterator[tuple[int, Callable[[], bool]]]:
    """A port of this machine, and whether anybody has called there."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)

        def was_called() -> bool:
            try:
                server.accept()[0].close()
            except TimeoutError:
                return False
            return True

        yield server.getsockname()[1], was_called
