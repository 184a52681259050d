"""Files that values are read from, damaged in many ways: each is refused by name with a remedy, or changes nothing.

Files as disks and people leave them: single bytes changed, cut short, grown, a page of zeros, taken from another
folder, emptied, removed.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raywgen.corpus import Corpus, NetworkFacts, commit_corpus
from raywgen.generators import GenerationRequest
from raywgen.generators.bundle import ENCODER, build_generator, load_bundle, save_bundle
from raywgen.tasks.encoders import EncoderCard, load_encoder, save_encoder
from raywgen.tasks.networks import Conv4
from raywgen.weights import Layout
from tests.builders import DATA, SMALL, condition, hypernetwork, layout_of, noise_for, normalizers
from tests.corpus import builders

_NUM_FLIPS = 24
_REMEDY = re.compile(
    r"restore it|train it again|train or copy|copy it again|give a folder with|train one by|make one by"
)


@dataclass(frozen=True)
class Kind:
    """A folder, how it is read, and what its files are.

    Attributes:
        make: Writes one to a folder; another seed gives another one.
        read: All that a user gets of it.
        files: Those whose damage is tried; all others, such as the card for people, decide nothing.
    """

    make: Callable[[Path, int], object]
    read: Callable[[Path], list[Any]]
    files: tuple[str, ...]


def make_encoder(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    card = EncoderCard(
        network={"name": "conv4", "in_channels": 1, "width": 4, "image_size": 16},
        size=16,
        channels=1,
        mean=(0.5,),
        std=(0.25,),
        facts={"accuracy": 0.5 + seed / 10},
        spread=1.0 + seed,
    )
    save_encoder(Conv4(in_channels=1, width=4, image_size=16).state_dict(), card, str(folder))


def read_encoder(folder: Path) -> list[Any]:
    encoder = load_encoder(str(folder))
    return [encoder(torch.linspace(-1, 1, 256)[None]), encoder.fingerprint]


def make_bundle(folder: Path, seed: int) -> None:
    make_encoder(folder / ENCODER, seed)
    generator = build_generator("hypernetwork", hypernetwork().config, normalizers(), DATA, seed)
    save_bundle(generator, folder, {"seed": seed})


def read_bundle(folder: Path) -> list[Any]:
    generator = load_bundle(folder)
    return [
        generator.generate(
            GenerationRequest(condition=condition(2), layout=layout_of(SMALL), noise=noise_for(2))
        ).values_BD,
        *read_encoder(folder / ENCODER),
    ]


def make_corpus(folder: Path, seed: int) -> None:
    states = [builders.states(f"net{width}-", 5, width, 100 * seed) for width in (2, 5)]
    shards = [builders.shard(folder, f"shard-{index}", part) for index, part in enumerate(states)]
    layouts = [Layout.from_state_dict(next(iter(part.values()))) for part in states]
    networks = [NetworkFacts(name=f"net-{layout.id}", recipe={}, layout=layout) for layout in layouts]
    task = replace(builders.task(), instruction=f"Is it {seed}?")
    commit_corpus(str(folder), shards=shards, tasks=[task], networks=networks, recipe={"seed": seed})


def read_corpus(folder: Path) -> list[Any]:
    corpus = Corpus.open(folder)
    chunks = [batch.values_BK.clone() for batch in corpus.stream(chunk_length=7, batch_size=4, prefetch=0).epoch()]
    weights = [tensor for _, state in corpus.checkpoints() for tensor in state.values()]
    contents = [corpus.facts.to_pylist(), corpus.info() | {"location": ""}, corpus.manifest]
    return [*chunks, *weights, json.dumps(contents), *(task.samples_SF for task in corpus.tasks.values())]


KINDS = {
    "encoder": Kind(make_encoder, read_encoder, ("encoder.json", "encoder.safetensors")),
    "bundle": Kind(
        make_bundle,
        read_bundle,
        ("generator.json", "generator.safetensors", "encoder/encoder.json", "encoder/encoder.safetensors"),
    ),
    "corpus": Kind(
        make_corpus,
        read_corpus,
        ("manifest.json", "checkpoints.parquet", "tasks.parquet", "weights/shard-0.arrow", "weights/shard-1.arrow"),
    ),
}


def damages(whole: bytes, other: bytes) -> Iterator[tuple[str, bytes | None]]:
    """What is wrong in words, and the content; None where the file is gone."""
    draw = np.random.default_rng(0)
    for place in np.unique(np.linspace(0, len(whole) - 1, _NUM_FLIPS).astype(int)):
        content = bytearray(whole)
        content[place] ^= int(draw.integers(1, 256))
        yield f"byte {place} changed", bytes(content)
    for left in (len(whole) - 1, len(whole) // 2, 9, 0):
        yield f"cut to {left} bytes", whole[:left]
    yield "grown", whole + b"\0" * 64
    start = len(whole) // 2 // 512 * 512
    yield "a page of zeros", whole[:start] + bytes(min(512, len(whole) - start)) + whole[start + 512 :]
    yield "another folder's", other
    yield "gone", None


@pytest.mark.parametrize(("name", "file"), [(name, file) for name, kind in KINDS.items() for file in kind.files])
def test_damage_is_refused_by_name_or_changes_nothing(tmp_path: Path, name: str, file: str) -> None:
    kind = KINDS[name]
    kind.make(tmp_path / "whole", 0)
    kind.make(tmp_path / "other", 1)
    expected = kind.read(tmp_path / "whole")
    whole, other = ((tmp_path / folder / file).read_bytes() for folder in ("whole", "other"))
    assert whole != other
    refusals: dict[str, str] = {}
    for number, (what, content) in enumerate(damages(whole, other)):
        folder = Path(shutil.copytree(tmp_path / "whole", tmp_path / "damaged" / str(number)))
        (folder / file).unlink()
        if content is not None:
            (folder / file).write_bytes(content)
        try:
            found = kind.read(folder)
        except ValueError as error:
            refusals[what] = str(error)
        else:
            assert all(map(equal, found, expected)), what
            assert len(found) == len(expected), what
    for what, message in refusals.items():
        # Of a manifest of another corpus it is the other files that do not fit.
        assert Path(file).name in message or (file, what) == ("manifest.json", "another folder's"), (what, message)
        assert _REMEDY.search(message), (what, message)
    assert {"cut to 9 bytes", "cut to 0 bytes", "gone", "another folder's"} <= set(refusals)
    assert len(refusals) > 0.7 * _NUM_FLIPS


def equal(left: object, right: object) -> bool:
    return (
        torch.equal(left, right)
        if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor)
        else left == right
    )
