"""A classifier for a few examples, chosen among heads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from raywgen.generation import ChanceWarning, ConditionError, TrainedGenerator
from raywgen.generators import DataSpec
from raywgen.generators.common.network import NetworkConfig
from raywgen.generators.mcdi import McDi, McDiConfig
from raywgen.tasks import build_network
from raywgen.tasks.encoders import FrozenEncoder
from raywgen.tasks.networks.conv4 import Conv4
from raywgen.tasks.preprocessing import InputForm
from raywgen.weights import Layout, Normalizer, WeightsError

SIZE, FEATURES, WAY, SHOT = 16, 8, 3, 4
CONFIG = McDiConfig(network=NetworkConfig(width=32, num_heads=2, num_layers=1))
pytestmark = pytest.mark.filterwarnings("ignore::raywgen.generation.ChanceWarning")


def trained(encoder: torch.nn.Module | None = None, mean: float = 0.8) -> TrainedGenerator:
    """A generator of heads that starts at nearest class means, on an encoder of 16 x 16 grey images."""
    torch.manual_seed(0)
    head = build_network({"name": "head", "num_features": FEATURES, "num_classes": WAY})
    layout = Layout.from_state_dict(head.state_dict())
    known = Normalizer(layout, torch.zeros(2), torch.full((2,), 0.5))
    generator = McDi(CONFIG, {layout.id: (layout, known)}, DataSpec(num_features=FEATURES, max_classes=WAY)).eval()
    inputs = InputForm(size=SIZE, channels=1, mean=(mean,), std=(0.3,))
    frozen = FrozenEncoder(encoder or Conv4(width=FEATURES, image_size=SIZE), name="own", identity="")
    return TrainedGenerator(generator, inputs, frozen)


def drawings(num: int, seed: int) -> tuple[Tensor, Tensor]:
    """Dark strokes of several directions on white paper, with noise; each class has a direction."""
    generator = torch.Generator().manual_seed(seed)
    labels_S = torch.arange(WAY).repeat_interleave(num)
    images = torch.full((len(labels_S), 1, SIZE, SIZE), 255.0)
    for image, label in zip(images, labels_S.tolist(), strict=True):
        at = int(torch.randint(3, SIZE - 3, (), generator=generator))
        if label == 0:
            image[0, at - 1 : at + 1] = 0
        elif label == 1:
            image[0, :, at - 1 : at + 1] = 0
        else:
            image[0].fill_diagonal_(0)
            image[0] = image[0].roll(at, 1)
    noise = torch.randint(0, 4, images.shape, generator=generator)
    return (images - noise).clamp(0, 255).to(torch.uint8), labels_S


def test_the_head_with_the_lowest_left_out_loss_is_kept_and_every_one_is_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    generator, support = trained(), drawings(SHOT, 0)
    best = generator.classifier(support)
    losses = {name: one.loss for name, one in best.heads.items() if one.loss is not None}
    assert list(losses) == ["written", "means", "ridge", "blocks", "own-means", "own-blocks"]
    assert best.kept == min(losses, key=lambda name: losses[name])
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 1 + len(losses)
    assert [line.split()[0] for line in shown if line.endswith("<- kept")] == [best.kept]
    images, labels_S = drawings(20, 1)
    for name, loss in losses.items():
        alone = generator.classifier(support, head=name, quiet=True)  # pyright: ignore[reportArgumentType]
        judged = alone.heads[name]
        assert alone.kept == name
        assert judged.loss is not None
        # Alone a written head is left as it was written, whatever the size of its logits.
        assert judged.loss == pytest.approx(loss, rel=1e-3) or (name == "written" and judged.loss > loss)
        logits_SC = alone(images)
        if name == best.kept:
            torch.testing.assert_close(best(images), logits_SC, rtol=1e-3, atol=1e-3)
    assert float((best(images).argmax(dim=1) == labels_S).float().mean()) > 0.8


def test_the_written_head_is_judged_by_heads_written_for_the_other_examples() -> None:
    generator, (images, labels_S) = trained(), drawings(2, 0)
    found = generator.classifier((images, labels_S), head="written", quiet=True).heads["written"].left_out
    right = []
    for left_out in range(len(labels_S)):
        kept_S = torch.arange(len(labels_S)) != left_out
        other = generator.classifier((images[kept_S], labels_S[kept_S]), head="written", quiet=True)
        right.append(other(images[left_out : left_out + 1]).argmax() == labels_S[left_out])
    assert found is not None
    assert found.share_right == pytest.approx(sum(map(float, right)) / len(right))


def test_pale_images_are_classified_as_dark_ones_by_the_examples_own_statistics() -> None:
    generator = trained()
    (images, labels_S), (others, _) = drawings(SHOT, 0), drawings(10, 1)
    pale, others_pale = (((x.float() - 255) / 4 + 200).round().to(torch.uint8) for x in (images, others))
    plain = generator.classifier((images, labels_S), head="own-blocks", quiet=True)
    seen = generator.classifier((pale, labels_S), head="own-blocks", quiet=True)
    agree = (plain(others).argmax(dim=1) == seen(others_pale).argmax(dim=1)).float().mean()
    assert float(agree) > 0.9
    assert not torch.allclose(plain(others), plain(others_pale), rtol=0.1, atol=0.1)


def test_ink_and_paper_are_exchanged_where_the_encoder_knows_them_the_other_way_round(
    capsys: pytest.CaptureFixture[str],
) -> None:
    generator, (images, labels_S) = trained(), drawings(SHOT, 0)
    plain = generator.classifier((images, labels_S), head="blocks", quiet=True)
    other = generator.classifier((255 - images, labels_S), head="blocks")
    assert "images are inverted" in capsys.readouterr().err
    torch.testing.assert_close(other(255 - images), plain(images), rtol=1e-3, atol=1e-3)
    # An encoder of photographs knows no paper.
    assert not trained(mean=0.5).classifier((255 - images, labels_S), quiet=True).view.inverted


def test_a_class_with_a_single_example_leaves_nothing_to_judge_by(capsys: pytest.CaptureFixture[str]) -> None:
    made = trained().classifier(drawings(1, 0))
    assert "nothing was measured" in capsys.readouterr().err
    assert made.heads[made.kept].left_out is None
    assert made(drawings(2, 1)[0]).shape == (2 * WAY, WAY)


def test_a_single_example_is_normalised_by_itself_only_where_it_is_far_from_what_the_encoder_knows() -> None:
    generator, (images, labels_S) = trained(), drawings(1, 0)
    assert generator.inputs is not None
    assert generator.encoder is not None
    generator.encoder = generator.encoder.normalised_by(generator.inputs.standardised(drawings(30, 2)[0]))
    assert generator.classifier((images, labels_S), quiet=True).kept == "means"
    pale = ((images.float() - 255) / 4 + 200).round().to(torch.uint8)
    assert generator.classifier((pale, labels_S), quiet=True).kept == "own-means"


def test_an_encoder_without_blocks_and_given_features_have_fewer_heads() -> None:
    generator = trained(torch.nn.Sequential(torch.nn.Linear(SIZE**2, FEATURES)))
    support = drawings(SHOT, 0)
    assert set(generator.classifier(support, quiet=True).heads) == {"written", "means", "ridge"}
    with pytest.raises(ConditionError, match="head=blocks: these examples and this encoder allow written, means, rid"):
        generator.classifier(support, head="blocks")
    features_SE = trained().features(support[0])
    assert set(trained().classifier((features_SE, support[1]), quiet=True).heads) == {"written", "means", "ridge"}


@pytest.mark.parametrize("head", ["written", "own-blocks"])
def test_a_written_file_gives_the_same_classifier(tmp_path: Path, head: str) -> None:
    generator, images = trained(), drawings(3, 1)[0]
    made = generator.classifier(drawings(SHOT, 0), head=head, quiet=True)  # pyright: ignore[reportArgumentType]
    made.save(tmp_path / "head.safetensors", {"task": "strokes"})
    loaded = generator.load_classifier(tmp_path / "head.safetensors")
    torch.testing.assert_close(loaded(images), made(images))
    assert loaded.classes == ("0", "1", "2")
    assert json.loads((tmp_path / "head.json").read_text())["task"] == "strokes"
    other = trained(Conv4(width=FEATURES, image_size=SIZE))
    other.generator, other.inputs = generator.generator, generator.inputs
    with pytest.raises(WeightsError, match="written beside another encoder"):
        other.load_classifier(tmp_path / "head.safetensors")
    (tmp_path / "head.json").unlink()
    with pytest.raises(WeightsError, match="does not say what"):
        generator.load_classifier(tmp_path / "head.safetensors")


def test_noise_is_warned_of() -> None:
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (WAY * 8, 1, SIZE, SIZE), generator=rng).to(torch.uint8)
    with pytest.warns(ChanceWarning, match="the classifier on your samples"):
        trained().classifier((images, torch.arange(WAY * 8) % WAY), quiet=True)


def test_labels_with_a_gap_are_refused() -> None:
    with pytest.raises(ConditionError, match="number the classes from 0 without a gap"):
        trained().classifier((drawings(2, 0)[0], torch.tensor([0, 0, 2, 2, 3, 3])))
