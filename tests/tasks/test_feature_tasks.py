from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raywgen.tasks import TaskError, build_task
from raywgen.tasks.domains import apply_domain
from raywgen.tasks.encoders import EncoderCard, load_encoder, save_encoder
from raywgen.tasks.image_tasks import input_statistics
from raywgen.tasks.networks import Conv4
from raywgen.weights.cache import FOLDER

SHARED = Path(__file__).parents[2] / "../shared/data"
OMNIGLOT = SHARED / "omniglot-background.parquet"
ENCODER = "tests.tasks.test_feature_tasks:Linear"
EPISODE: dict[str, Any] = {"path": "digits", "way": 4, "shot": 3, "num_query": 2, "rotations": True}


class Linear(nn.Linear):
    def __init__(self) -> None:
        super().__init__(64, 5)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path / "cache"))


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("rotations", [True, False])
def test_a_feature_episode_is_the_pixel_episode_encoded(split: str, rotations: bool) -> None:
    encoder = load_encoder(ENCODER)
    for index in range(4):
        arguments = EPISODE | {"split": split, "index": index, "rotations": rotations, "seed": 2, "way": 2}
        pixels = build_task({"name": "episode", **arguments})
        features = build_task({"name": "feature-episode", "encoder": ENCODER, **arguments})
        torch.testing.assert_close(features.train_x_SF, encoder(pixels.train_x_SF))
        torch.testing.assert_close(features.test_x_SF, encoder(pixels.test_x_SF))
        assert torch.equal(features.train_y_S, pixels.train_y_S)
        assert torch.equal(features.test_y_S, pixels.test_y_S)
        assert features.train_x_SF.dtype == torch.float32
        assert features.instruction == pixels.instruction
        assert features.id == f"{pixels.id}/through-Linear"


@pytest.mark.parametrize("domain", ["invert", "rotate-30", "contrast-0.5"])
def test_a_domain_changes_pixels_and_not_rows_and_is_standardised_as_the_plain_one(domain: str) -> None:
    arguments = EPISODE | {"index": 1, "split": "all", "way": 9, "rotations": False}
    plain = build_task({"name": "episode", **arguments})
    pixels = build_task({"name": "episode", **arguments, "domain": domain})
    features = build_task({"name": "feature-episode", "encoder": ENCODER, **arguments, "domain": domain})
    mean, std = (value.flatten() for value in input_statistics("digits", None, None))
    seen_SCHW = apply_domain((plain.train_x_SF * std + mean).clamp(0, 1).view(-1, 1, 8, 8), domain)
    # Pixels in a domain are rounded to 256 levels.
    torch.testing.assert_close(pixels.train_x_SF * std + mean, seen_SCHW.flatten(1), atol=0.51 / 255, rtol=0)
    torch.testing.assert_close(features.train_x_SF, load_encoder(ENCODER)(pixels.train_x_SF))
    assert torch.equal(pixels.train_y_S, plain.train_y_S)
    assert pixels.id == plain.id.replace("all-1", f"{domain}/all-1")
    assert domain in pixels.instruction
    assert pixels.recipe["domain"] == domain
    assert "domain" not in plain.recipe


def test_feature_tasks_come_back_from_their_recipes() -> None:
    for recipe in (
        {"name": "feature-episode", "encoder": ENCODER, "index": 3, **EPISODE},
        {"name": "feature-episode", "encoder": ENCODER, "index": 3, **EPISODE, "domain": "invert"},
        {"name": "encoded", "encoder": ENCODER, "task": {"name": "images", "path": "digits", "classes": [7, 2]}},
    ):
        task = build_task(recipe)
        again = build_task(json.loads(json.dumps(task.recipe)))
        assert (again.id, again.instruction) == (task.id, task.instruction)
        for name in ("train_x_SF", "train_y_S", "test_x_SF", "test_y_S"):
            assert torch.equal(getattr(again, name), getattr(task, name))


def test_any_task_is_seen_through_an_encoder() -> None:
    encoder = load_encoder(ENCODER)
    for recipe in (
        {"name": "images", "path": "digits", "domain": "invert", "limit": 50},
        {"name": "digits-subset", "labels": [1, 4]},
    ):
        plain = build_task(recipe)
        task = build_task({"name": "encoded", "encoder": ENCODER, "task": recipe})
        torch.testing.assert_close(task.train_x_SF, encoder(plain.train_x_SF))
        torch.testing.assert_close(task.test_x_SF, encoder(plain.test_x_SF))
        assert torch.equal(task.train_y_S, plain.train_y_S)
        assert (task.num_classes, task.instruction) == (plain.num_classes, plain.instruction)
        assert task.id == f"{plain.id}/through-Linear"


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"name": "feature-episode", "encoder": "no/encoder", "index": 0, **EPISODE}, "no encoder in 'no/encoder'"),
        ({"name": "feature-episode", "encoder": ENCODER, "index": 0, **EPISODE, "size": 9}, "samples of 81 values"),
        ({"name": "feature-episode", "encoder": ENCODER, "index": 0, **EPISODE, "split": "seen"}, "split=seen"),
        ({"name": "feature-episode", "encoder": ENCODER, "index": 0, **EPISODE, "way": 99}, "way=99"),
        ({"name": "feature-episode", "index": 0, **EPISODE}, "does not take"),
        ({"name": "encoded", "encoder": ENCODER, "task": {"name": "image"}}, "unknown task 'image'"),
        ({"name": "encoded", "encoder": "", "task": {"name": "images", "path": "digits"}}, "encoder is empty"),
    ],
)
def test_what_cannot_be_built_is_named(recipe: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        build_task(recipe)


@pytest.mark.skipif(not OMNIGLOT.is_file(), reason="../shared/data is not there")
def test_real_omniglot_episodes_are_drawn_fast(tmp_path: Path) -> None:
    folder = str(tmp_path / "encoder")
    network = {"name": "conv4", "width": 2}
    card = EncoderCard(network=network, size=28, channels=1, mean=(0.5,), std=(0.5,))
    save_encoder(Conv4(width=2).state_dict(), card, folder)
    arguments: dict[str, Any] = {"path": str(OMNIGLOT), "group": "alphabet", "way": 5, "shot": 15, "num_query": 5}
    arguments |= {"size": 28, "channels": 1}
    recipe = {"name": "feature-episode", "encoder": folder, **arguments}
    pixels = build_task({"name": "episode", "index": 1, **arguments})
    features = build_task({**recipe, "index": 1})
    torch.testing.assert_close(features.train_x_SF, load_encoder(folder)(pixels.train_x_SF), rtol=1e-4, atol=1e-5)
    begin = time.perf_counter()
    tasks = [build_task({**recipe, "index": index}) for index in range(2, 202)]
    # 0.3 ms each on a quiet machine.
    assert time.perf_counter() - begin < 4
    assert tasks[0].train_x_SF.shape == (75, 2)
