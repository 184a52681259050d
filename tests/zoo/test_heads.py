from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from raywgen.tasks import build_task
from raywgen.weights.cache import FOLDER
from raywgen.zoo import ZooConfig
from raywgen.zoo.config import TaskKind, ZooTasks
from raywgen.zoo.draw import draw_tasks
from tests.conftest import make_zoo

ENCODER = "tests.zoo.test_heads:Linear"
COUNTS: dict[str, Any] = {"num_seen_tasks": 3, "num_validation_tasks": 1, "num_unseen_tasks": 2}


class Linear(nn.Linear):
    def __init__(self) -> None:
        super().__init__(64, 16)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path / "cache"))


def zoo(kind: TaskKind, encoder: str, **settings: Any) -> ZooConfig:
    networks = [{"name": "head", "num_features": 16, "num_classes": 10}]
    return ZooConfig(tasks=ZooTasks(kind=kind, encoder=encoder, **settings), networks=networks, **COUNTS)


def test_episodes_are_seen_through_the_encoder() -> None:
    drawn = draw_tasks(zoo("episodes", ENCODER, way=2, shot=3, rotations=True))
    recipes = [recipe for recipes in drawn.values() for recipe in recipes]
    assert {(recipe["name"], recipe["encoder"]) for recipe in recipes} == {("feature-episode", ENCODER)}
    assert [recipe["split"] for recipe in drawn["unseen"]] == ["test", "test"]
    assert len({build_task(recipe).id for recipe in recipes}) == 6


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("images", {}), ("class-subsets", {}), ("domains", {"domains": ["plain", "invert"]}), ("digits-subsets", {})],
)
def test_other_tasks_are_encoded(kind: TaskKind, settings: dict[str, Any]) -> None:
    plain, seen = draw_tasks(zoo(kind, "", **settings)), draw_tasks(zoo(kind, ENCODER, **settings))
    for split, recipes in plain.items():
        assert [recipe["task"] for recipe in seen[split]] == recipes
        assert {(recipe["name"], recipe["encoder"]) for recipe in seen[split]} <= {("encoded", ENCODER)}


@pytest.mark.parametrize(
    ("given", "placed"),
    [("encoders/mine", "{here}/encoders/mine"), (ENCODER, ENCODER), ("hf:a/b", "hf:a/b"), ("s3://b/c", "s3://b/c")],
)
def test_the_place_of_an_encoder_is_absolute(
    given: str, placed: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (recipe,) = draw_tasks(zoo("images", given))["seen"]
    assert recipe["encoder"] == placed.format(here=tmp_path)


@pytest.mark.parametrize("kind", ["episodes", "class-subsets"])
def test_heads_train_into_a_corpus(kind: TaskKind, tmp_path: Path) -> None:
    config = ZooConfig(
        tasks=ZooTasks(kind=kind, encoder=ENCODER, way=2, shot=10, subset_size=2),
        networks=[{"name": "head", "num_features": 16, "num_classes": 2}],
        **COUNTS,
        seeds_per_task=1,
        num_steps=40,
        checkpoint_steps=[0, 40],
        batch_size=20,
        learning_rate=0.02,
        loss="plain",
    )
    corpus = make_zoo(config, tmp_path / "corpus")
    rows = [row for row in corpus.facts.to_pylist() if row["split"] != "base"]
    assert all(row["test_accuracy"] == pytest.approx(0.5) for row in rows if row["step"] == 0)
    trained = [row["test_accuracy"] for row in rows if row["step"] == 40]
    assert sum(trained) / len(trained) > 0.8
    assert {row["source"] for row in rows} == {"raywgen zoo on digits"}
    recipe = next(iter(corpus.tasks.values())).recipe
    assert build_task(recipe).train_x_SF.shape[1] == 16


def test_features_are_not_augmented() -> None:
    with pytest.raises(ValueError, match="features are no images"):
        ZooConfig(tasks=ZooTasks(kind="images", encoder=ENCODER), augment="shift-1")
