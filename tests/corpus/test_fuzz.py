"""1,600 mutated corpora: every one is refused by name or reads as it was written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raywgen.corpus import Corpus, CorpusError, verify_corpus
from raywgen.sealed import sealed_json
from raywgen.weights import StateDict
from tests.corpus import builders

MUTATIONS_PER_CASE = 100


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    builders.small_corpus(root, num_narrow=60)  # All are read again after each mutation.
    return root


@pytest.fixture(scope="module")
def written(whole: Path) -> dict[str, StateDict]:
    return {facts["checkpoint_id"]: state for facts, state in Corpus.open(whole).checkpoints()}


def flip(content: bytes, draw: np.random.Generator) -> bytes:
    changed = bytearray(content)
    for place in draw.integers(len(changed), size=int(draw.integers(1, 9))):
        changed[place] ^= 1 << int(draw.integers(8))
    return bytes(changed)


def cut(content: bytes, draw: np.random.Generator) -> bytes:
    return content[: int(draw.integers(len(content)))]


def repeat(content: bytes, draw: np.random.Generator) -> bytes:
    first, last = sorted(draw.integers(len(content), size=2).tolist())
    return content[:last] + content[first:]


def overwrite(content: bytes, draw: np.random.Generator) -> bytes:
    first, last = sorted(draw.integers(len(content), size=2).tolist())
    return content[:first] + draw.bytes(last - first) + content[last:]


MUTATIONS: dict[str, Callable[[bytes, np.random.Generator], bytes]] = {
    "flip": flip,
    "cut": cut,
    "repeat": repeat,
    "overwrite": overwrite,
}


def opened(root: Path) -> Corpus | None:
    """None where it is refused by name."""
    try:
        return Corpus.open(root)
    except CorpusError as error:
        if str(root) not in str(error):
            raise
        return None


def assert_refused_or_as_written(root: Path, written: dict[str, StateDict]) -> None:
    """Reads checkpoint by checkpoint, as a damaged shard must not cost those of another."""
    corpus = opened(root)
    if corpus is None:
        return
    assert corpus.facts.num_rows == len(written)
    for name, state in written.items():
        with suppress(CorpusError):
            found = corpus.state_dict(name)
            assert found.keys() == state.keys()
            assert all(torch.equal(found[key], tensor) for key, tensor in state.items())


def is_found(root: Path) -> bool:
    try:
        return bool(verify_corpus(root))
    except CorpusError as error:
        return "manifest.json" in str(error)


def meaning(content: bytes) -> object:
    """Of JSON, in which a blank more or a key said twice changes nothing."""
    try:
        return json.loads(content)
    except ValueError:
        return content


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("name", ["manifest.json", "checkpoints.parquet", "weights"])
def test_mutated_files(mutation: str, name: str, whole: Path, written: dict[str, StateDict], tmp_path: Path) -> None:
    root = Path(shutil.copytree(whole, tmp_path / "corpus"))
    draw = np.random.default_rng(list(MUTATIONS).index(mutation))
    path = sorted((root / "weights").iterdir())[0] if name == "weights" else root / name
    original = path.read_bytes()
    for _ in range(MUTATIONS_PER_CASE):
        path.write_bytes(MUTATIONS[mutation](original, draw))
        assert_refused_or_as_written(root, written)
        if meaning(path.read_bytes()) != meaning(original):
            assert is_found(root)
    path.write_bytes(original)
    assert verify_corpus(root) == []


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, item in inner for found in places(item, (*path, key)))]


@pytest.mark.parametrize("value", [None, -1, 10**30, "", "../../etc/passwd", [], {"a": 1}, 0.5])
def test_any_entry_of_the_manifest_replaced(
    value: object, whole: Path, written: dict[str, StateDict], tmp_path: Path
) -> None:
    """With its checksum made right again, as by somebody who means it."""
    root = Path(shutil.copytree(whole, tmp_path / "corpus"))
    path = root / "manifest.json"
    original = json.loads(path.read_text())
    where = [place for place in places(original) if place and place[0] not in ("checksum", "recipe", "statistics")]
    draw = np.random.default_rng(0)
    for index in draw.permutation(len(where))[:50]:
        changed = json.loads(json.dumps(original))
        owner = changed
        for key in where[index][:-1]:
            owner = owner[key]
        owner[where[index][-1]] = value
        del changed["checksum"]
        path.write_text(sealed_json(changed))
        assert_refused_or_as_written(root, written)
