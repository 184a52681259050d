from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from raywgen.tasks import TaskError, build_task
from raywgen.tasks.encoder_training import EncoderConfig, prototype_accuracy, prototype_logits, train_encoder
from raywgen.tasks.encoders import EncoderError, encoder_fingerprint, read_card
from raywgen.tasks.features import feature_data
from raywgen.tasks.image_tasks import classes_of, images_of
from raywgen.tasks.images import ImageData

SHARED = Path(__file__).parents[2] / "../shared/data"
OMNIGLOT = SHARED / "omniglot-background.parquet"
TINY: dict[str, Any] = {
    "path": "digits",
    "size": 16,
    "width": 4,
    "way": 8,
    "num_query": 2,
    "num_episodes": 6,
    "validate_every": 4,
    "validation_episodes": 20,
    "precision": "fp32",
}


def test_logits_are_squared_distances_to_class_means() -> None:
    support_BSE, query_BQE = torch.randn(2, 6, 5).double(), torch.randn(2, 4, 5).double()
    logits_BQN = prototype_logits(support_BSE, query_BQE, way=3)
    for b in range(2):
        for q in range(4):
            for n in range(3):
                centre_E = (support_BSE[b, 2 * n] + support_BSE[b, 2 * n + 1]) / 2
                torch.testing.assert_close(logits_BQN[b, q, n], -(query_BQE[b, q] - centre_E).square().sum())


def test_accuracy_counts_queries_nearest_to_their_class() -> None:
    y_S = torch.arange(8).repeat_interleave(20)
    data = ImageData(name="d", x_SCHW=torch.zeros(160, 1, 1, 1), y_S=y_S, class_names=tuple("abcdefgh"), source="test")
    perfect = feature_data(data, torch.nn.functional.one_hot(y_S).float(), rotations=False)
    assert prototype_accuracy(perfect, list(range(8)), num_episodes=60, seed=0) == 1
    noise = feature_data(data, torch.randn(160, 4), rotations=False)
    assert prototype_accuracy(noise, list(range(8)), num_episodes=60, seed=0) == pytest.approx(0.2, abs=0.05)


def test_equal_seeds_give_equal_encoders(tmp_path: Path) -> None:
    def trained(name: str, **changes: Any) -> str:
        train_encoder(EncoderConfig(**(TINY | changes), out=str(tmp_path / name)))
        return encoder_fingerprint(str(tmp_path / name))

    first = trained("first")
    torch.manual_seed(5)
    assert trained("again") == first
    assert trained("other", seed=1) != first
    assert trained("half", precision="bf16") != first


def test_a_finished_encoder_is_used_again_and_one_of_another_config_is_not(tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    config = EncoderConfig(**TINY, out=str(tmp_path / "encoder"))
    card = train_encoder(config, lambda *progress: told.append(progress))
    assert [done for done, _, _ in told] == [1, 2, 3, 4, 5, 6]
    assert told[-1][2].startswith("episode 6, loss ")
    assert "validation accuracy" in told[-1][2]
    again = train_encoder(config, lambda *progress: told.append(progress))
    assert len(told) == 6
    assert again.facts == card.facts
    train_encoder(dataclasses.replace(config, num_episodes=2), lambda *progress: told.append(progress))
    assert len(told) == 8
    assert read_card(config.out).facts["recipe"]["num_episodes"] == 2


def test_training_sees_only_the_classes_that_episodes_are_trained_on(tmp_path: Path) -> None:
    config = EncoderConfig(**TINY, seed=3, out=str(tmp_path / "encoder"))
    facts = train_encoder(config).facts
    data = images_of("digits", 16, 1, None)
    splits = {split: set(classes_of(data, split, "", 3)) for split in ("train", "validation", "test")}
    assert {data.class_names.index(name) for name in facts["train_classes"]} == splits["train"]
    assert not splits["train"] & (splits["validation"] | splits["test"])
    assert not splits["validation"] & splits["test"]


def test_training_makes_features_that_tell_unseen_classes_apart(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"width": 16, "way": 16, "num_episodes": 60, "validate_every": 30}
    config = EncoderConfig(**(TINY | changes), out=str(tmp_path / "encoder"))
    facts = train_encoder(config).facts
    # Five of the eight turned classes of two unseen digits; chance is 0.2.
    assert facts["validation_accuracy"] > 0.5
    assert facts["episode"] in (30, 60)
    told = {"path": "digits", "size": 16, "way": 2, "shot": 5, "split": "test", "index": 0}
    task = build_task({"name": "feature-episode", "encoder": config.out, **told})
    logits_1QN = prototype_logits(task.train_x_SF.unsqueeze(0), task.test_x_SF.unsqueeze(0), way=2)
    assert float((logits_1QN[0].argmax(dim=1) == task.test_y_S).float().mean()) > 0.7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": ""}, "path is empty"),
        ({"path": "nothing.parquet"}, r"nothing\.parquet"),
        ({"way": 25}, "way=25: there are 24 classes"),
        ({"group": "alphabet"}, "no column 'alphabet'"),
        ({"size": 15}, "image_size=15"),
        ({"learning_rate": 1e36}, "training diverged"),
    ],
)
def test_what_cannot_be_trained_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=message):
        train_encoder(EncoderConfig(**(TINY | changes), out=str(tmp_path / "encoder")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shot": 0}, "shot=0: must be at least 1"),
        ({"seed": -1}, "seed=-1"),
        ({"learning_rate": 0.0}, "learning_rate=0.0: must be above 0"),
        ({"precision": "fp8"}, "precision=fp8: give one of auto, bf16, fp32"),
    ],
)
def test_wrong_settings_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EncoderConfig(**(TINY | changes))


def test_an_encoder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "encoder.safetensors").mkdir()
    with pytest.raises(EncoderError, match="cannot write the encoder"):
        train_encoder(EncoderConfig(**TINY, out=str(tmp_path)))


@pytest.mark.skipif(not OMNIGLOT.is_file(), reason="../shared/data is not there")
def test_real_omniglot(tmp_path: Path) -> None:
    config = EncoderConfig(
        path=str(OMNIGLOT),
        group="alphabet",
        rotations=False,
        width=8,
        way=20,
        num_episodes=3,
        validation_episodes=50,
        out=str(tmp_path / "encoder"),
    )
    facts = train_encoder(config).facts
    # Chance is 0.2; random features of this kind reach 0.5.
    assert facts["validation_accuracy"] > 0.35
    assert len(facts["train_classes"]) > 500
