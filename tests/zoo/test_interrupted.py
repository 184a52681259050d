"""A zoo that is stopped goes on where it stopped."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import raywgen.zoo.train
from raywgen.corpus import CorpusError, MissingFileError
from raywgen.corpus.corpus import Corpus
from raywgen.zoo import train_zoo
from tests.conftest import TINY_ZOO

CONFIG = dataclasses.replace(TINY_ZOO, num_steps=20, checkpoint_steps=[20], stack_size=8)


def files(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_stacks_that_are_done_are_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tmp_path / "whole"
    train_zoo(CONFIG, str(whole), distributed=False)
    trained: list[str] = []
    real = raywgen.zoo.train.train_stack

    def stops_at_the_fifth(stack: object, *rest: object) -> object:
        trained.append(stack.name)  # pyright: ignore[reportAttributeAccessIssue]
        if len(trained) == 5:
            raise KeyboardInterrupt
        return real(stack, *rest)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(raywgen.zoo.train, "train_stack", stops_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        train_zoo(CONFIG, str(tmp_path / "c"), distributed=False)
    with pytest.raises(MissingFileError):
        Corpus.open(tmp_path / "c")
    with pytest.raises(CorpusError, match="holds an unfinished zoo of another recipe"):
        train_zoo(dataclasses.replace(CONFIG, seed=1), str(tmp_path / "c"), distributed=False)
    progress: list[tuple[int, int]] = []
    train_zoo(CONFIG, str(tmp_path / "c"), lambda done, total: progress.append((done, total)), distributed=False)
    assert len(trained) - 1 == len(set(trained)), "only the one that was stopped is trained twice"
    # What was done before counts from the first report on.
    assert progress[0][0] > progress[-1][1] / len(set(trained))
    assert progress[-1][0] == progress[-1][1]
    assert files(tmp_path / "c") == files(whole)


def test_a_diverged_network_is_recorded_and_stops_nothing(tmp_path: Path) -> None:
    # Weights of 1e30 overflow where a hidden unit lives, and stay finite where all are dead.
    corpus = train_zoo(dataclasses.replace(CONFIG, learning_rate=1e30), str(tmp_path / "c"), distributed=False)
    lost = corpus.quarantine.column("checkpoint_id").to_pylist()
    kept = set(corpus.facts.column("trajectory_id").to_pylist())
    assert 0 < len(lost) == corpus.manifest["recipe"]["num_diverged"]
    assert len(kept) > len(corpus.networks)
    assert kept.isdisjoint(lost)
    assert set(corpus.quarantine.column("reason").to_pylist()) == {"diverged: not finite"}
