"""Pieces of a large network over real Ray actors: the same file, though one of them is killed on the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from raywgen.corpus import Corpus
from raywgen.generation import generate
from tests.generation.test_pieces import PARALLEL, assert_same_files, settings_of, windowed
from tests.generation.test_sinks import without_paths

__all__ = ["windowed"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:this generator was never"),
]


@pytest.fixture(scope="module", autouse=True)
def ray_session() -> Iterator[None]:
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def actors() -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return [child for child in children if any("ray::_Worker" in part for part in child.cmdline())]


@pytest.mark.parametrize("windows", ["parallel", "sequential"])
def test_actors_write_what_one_process_writes(zoo_corpus: Corpus, windowed: str, tmp_path: Path, windows: str) -> None:
    sampling = {**PARALLEL, "windows": windows}
    here = settings_of(zoo_corpus, windowed, tmp_path / "here", limit=1, sampling=sampling)
    there = dataclasses.replace(here, where="ray", num_actors=2, out=str(tmp_path / "ray"))
    seen: list[int] = []
    killed: list[int] = []

    def kill_one(done: int, total: int) -> None:
        seen.append(done)
        if done > total / 3 and not killed:
            victim = actors()[0]
            killed.append(victim.pid)
            victim.kill()

    rows = generate(there, None, kill_one)
    assert killed
    assert seen == sorted(seen), "what was written is not done again"
    assert without_paths(rows) == without_paths(generate(here))
    assert_same_files(tmp_path / "ray", tmp_path / "here")
    for path in (tmp_path / "here").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "ray" / path.name).read_bytes()
