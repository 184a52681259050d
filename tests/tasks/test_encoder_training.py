from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raywgen.config import merge_config
from raywgen.tasks import TaskError, build_network, build_task, encoder_training
from raywgen.tasks.encoder_training import EncoderConfig, prototype_accuracy, prototype_logits, train_encoder
from raywgen.tasks.encoders import EncoderError, load_encoder, read_card
from raywgen.tasks.features import feature_data
from raywgen.tasks.image_classes import class_subset
from raywgen.tasks.image_tasks import classes_of, images_of
from raywgen.tasks.images import ImageData, normalise

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
        return load_encoder(str(tmp_path / name)).fingerprint

    first = trained("first")
    torch.manual_seed(5)
    assert trained("again") == first
    assert trained("other", seed=1) != first
    assert trained("half", precision="bf16") != first


def test_a_finished_encoder_is_used_again_and_one_of_another_config_is_not(tmp_path: Path) -> None:
    messages: list[tuple[int, int, str]] = []
    config = EncoderConfig(**TINY, out=str(tmp_path / "encoder"))
    card = train_encoder(config, lambda *progress: messages.append(progress))
    assert [done for done, _, _ in messages] == [1, 2, 3, 4, 5, 6]
    assert messages[-1][2].startswith("episode 6, loss ")
    assert "validation accuracy" in messages[-1][2]
    again = train_encoder(config, lambda *progress: messages.append(progress))
    assert len(messages) == 6
    assert again.facts == card.facts
    train_encoder(dataclasses.replace(config, num_episodes=2), lambda *progress: messages.append(progress))
    assert len(messages) == 8
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
    arguments = {"path": "digits", "size": 16, "way": 2, "shot": 5, "split": "test", "index": 0}
    task = build_task({"name": "feature-episode", "encoder": config.out, **arguments})
    logits_1QN = prototype_logits(task.train_x_SF.unsqueeze(0), task.test_x_SF.unsqueeze(0), way=2)
    assert float((logits_1QN[0].argmax(dim=1) == task.test_y_S).float().mean()) > 0.7


def raw_features(out: str, seed: int, split: str) -> ImageData:
    """A split's images through the network of a folder, before features are centred and scaled."""
    data = images_of("digits", 16, 1, None)
    card = read_card(out)
    module = build_network(card.network).eval()
    module.load_state_dict(load_file(f"{out}/encoder.safetensors"))
    chosen = class_subset(data, classes_of(data, split, "", seed))
    x_SCHW = normalise(chosen.x_SCHW, mean=card.mean, std=card.std)
    with torch.no_grad():
        return feature_data(chosen, module(x_SCHW), rotations=False)


def test_an_encoder_is_chosen_by_validation_classes_and_centred_by_training_classes(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"width": 16, "num_episodes": 20, "rotations": False, "way": 5, "validate_every": 20}
    config = EncoderConfig(**(TINY | changes), seed=3, out=str(tmp_path / "encoder"))
    card = train_encoder(config)

    def accuracy_on(split: str) -> float:
        features = raw_features(config.out, 3, split)
        way = len(features.class_names)
        return prototype_accuracy(features, list(range(way)), num_episodes=20, seed=3, way=way)

    assert card.facts["validation_accuracy"] == pytest.approx(accuracy_on("validation"), abs=1e-6)
    assert card.facts["validation_accuracy"] != pytest.approx(accuracy_on("test"), abs=1e-3)
    features_SE = raw_features(config.out, 3, "train").x_SCHW.flatten(1)
    centre_E = features_SE.mean(dim=0)
    # Sums over a thousand images in another order.
    torch.testing.assert_close(torch.tensor(card.centre), centre_E, rtol=1e-4, atol=1e-5)
    assert card.spread == pytest.approx(float((features_SE - centre_E).square().mean().sqrt()), rel=1e-4)


def test_the_encoder_of_the_best_validation_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kept(name: str, accuracies: list[float]) -> tuple[int, float, str]:
        left = iter(accuracies)
        monkeypatch.setattr(encoder_training._Training, "_validate", lambda *_: next(left))
        facts = train_encoder(EncoderConfig(**TINY, out=str(tmp_path / name))).facts
        return facts["episode"], facts["validation_accuracy"], load_encoder(str(tmp_path / name)).fingerprint

    *early, first = kept("falling", [0.9, 0.1])
    *late, last = kept("rising", [0.1, 0.9])
    assert (early, late) == ([4, 0.9], [6, 0.9])
    assert first != last


def test_training_in_both_polarities_makes_features_that_hold_in_the_other(tmp_path: Path) -> None:
    """The share of digits whose nearest class mean is right, where the means are of images in the other polarity."""
    found = {}
    for domains in (["plain"], ["plain", "invert"]):
        changes = {"width": 16, "num_episodes": 50, "validate_every": 50, "rotations": False, "way": 6, "shift": 0}
        changes |= {"domains": domains, "num_query": 8, "learning_rate": 5e-3}
        config = EncoderConfig(**(TINY | changes), out=str(tmp_path / "-".join(domains)))
        assert ("domains" in train_encoder(config).facts["recipe"]) == (len(domains) > 1)
        encoder = load_encoder(config.out)
        data = images_of("digits", 16, 1, None)
        plain_SE, inverted_SE = (encoder(normalise(x_SCHW).flatten(1)) for x_SCHW in (data.x_SCHW, 255 - data.x_SCHW))
        means_CE = torch.stack([inverted_SE[data.y_S == label].mean(dim=0) for label in range(10)])
        found[len(domains)] = float((torch.cdist(plain_SE, means_CE).argmin(dim=1) == data.y_S).float().mean())
    assert found[2] > found[1] + 0.2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"domains": ["invart"]}, "did you mean 'invert'"),
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
        ({"domains": []}, "domains is empty"),
        ({"shot": 0}, "shot=0: must be at least 1"),
        ({"seed": -1}, "seed=-1"),
        ({"learning_rate": 0.0}, "learning_rate=0.0: must be above 0"),
        ({"precision": "fp8"}, "precision=fp8: give one of auto, bf16, fp32"),
    ],
)
def test_wrong_settings_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge_config(EncoderConfig, [("the settings", TINY | changes)])


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
