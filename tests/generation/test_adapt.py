from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import raywgen
from raywgen.config import ConfigError, load_config
from raywgen.generation import AdaptConfig, ConditionError, UnknownLayoutError, adapt
from raywgen.generation.adapt import read_support
from raywgen.generation.head_names import HeadName
from raywgen.generators import DataSpec
from raywgen.generators.bundle import ENCODER, save_bundle
from raywgen.generators.common.network import NetworkConfig
from raywgen.generators.lohp import LoHp, LoHpConfig
from raywgen.generators.mcdi import McDi, McDiConfig
from raywgen.tasks import build_network
from raywgen.tasks.encoders import EncoderCard, save_encoder
from raywgen.weights import Layout, Normalizer
from tests.builders import DATA, SMALL, network, normalizers

SIZE, FEATURES, WAY = 16, 8, 3
CONFIG = McDiConfig(network=NetworkConfig(width=32, num_heads=2, num_layers=1))


def head(num_classes: int = WAY) -> nn.Module:
    return build_network({"name": "head", "num_features": FEATURES, "num_classes": num_classes})


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A generator of heads on an encoder of 16 x 16 grey images, trained on nothing."""
    torch.manual_seed(0)
    layout = Layout.from_state_dict(head().state_dict())
    known = Normalizer(layout, torch.zeros(2), torch.full((2,), 0.5))
    generator = McDi(CONFIG, {layout.id: (layout, known)}, DataSpec(num_features=FEATURES, max_classes=WAY)).eval()
    inputs = {"size": SIZE, "channels": 1, "mean": [0.2], "std": [0.5], "encoder": "gone"}
    folder = tmp_path / "generator"
    save_bundle(generator, folder, {"inputs": inputs})
    recipe = {"name": "conv4", "width": FEATURES, "image_size": SIZE}
    card = EncoderCard(network=recipe, size=SIZE, channels=1, mean=(0.2,), std=(0.5,))
    save_encoder(build_network(recipe).state_dict(), card, str(folder / ENCODER))
    return tmp_path


def images(num_classes: int = WAY, shot: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (num_classes * shot, 1, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    return pixels, torch.arange(num_classes).repeat_interleave(shot)


def class_folders(root: Path, num_classes: int = WAY) -> Path:
    pixels, labels = images(num_classes)
    for index, (image, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
        folder = root / f"class-{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(folder / f"{index}.png")
    return root


def config(bundle: Path, support: Path, out: Path, head: HeadName = "best") -> AdaptConfig:
    return AdaptConfig(generator=str(bundle), support=str(support), out=str(out), head=head)


@pytest.mark.parametrize("num_classes", [2, WAY, 5])
def test_a_folder_of_images_becomes_a_head_for_its_classes(bundle: Path, tmp_path: Path, num_classes: int) -> None:
    support = class_folders(tmp_path / "support", num_classes)
    found = adapt(config(bundle, support, tmp_path / "head.safetensors", "written"))
    state = load_file(found.path)
    head(num_classes).load_state_dict(state, strict=True)
    assert found.classes == tuple(f"class-{label}" for label in range(num_classes))
    assert json.loads((tmp_path / "head.json").read_text())["classes"] == list(found.classes)
    assert (found.num_values, found.num_examples) == (num_classes * (FEATURES + 1), 2 * num_classes)
    assert found.encode_ms > 0
    assert found.generate_ms > 0


def test_the_command_and_the_method_write_the_same(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    support = class_folders(tmp_path / "support")
    found = adapt(config(bundle, support, tmp_path / "head.safetensors", "written"))
    trained = raywgen.load(bundle)
    data = read_support(str(support), trained)
    module = head()
    trained.adapt(nn.DataParallel(module), (data.x, data.labels))
    assert f"{type(module).__name__} on your samples: " in capsys.readouterr().err
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(tensor, load_file(found.path)[name], rtol=0, atol=1e-6)


def test_the_best_of_all_heads_is_written_and_read_again(bundle: Path, tmp_path: Path) -> None:
    support = class_folders(tmp_path / "support")
    found = adapt(config(bundle, support, tmp_path / "head.safetensors"))
    facts = json.loads((tmp_path / "head.json").read_text())
    assert facts["heads"].keys() == {"written", "means", "ridge", "blocks", "own-means", "own-blocks"}
    assert [line.split()[0] for line in found.heads if line.endswith("<- kept")] == [facts["kept"]]
    assert found.on_examples is not None
    assert facts["heads"][facts["kept"]]["accuracy"] == found.on_examples.accuracy
    trained, pixels = raywgen.load(bundle), images()[0]
    made = trained.classifier(str(support), quiet=True)
    assert made.kept == facts["kept"]
    torch.testing.assert_close(trained.load_classifier(found.path)(pixels), made(pixels))


def test_only_a_written_head_has_an_optimiser(bundle: Path, tmp_path: Path) -> None:
    settings = config(bundle, class_folders(tmp_path / "support"), tmp_path / "head.safetensors")
    with pytest.raises(ConditionError, match="give head=written, too"):
        adapt(replace(settings, policy="sam"))


def test_pixels_samples_and_features_give_the_same_head(bundle: Path) -> None:
    trained = raywgen.load(bundle)
    pixels, labels = images()
    samples = (pixels.float() / 255 - 0.2) / 0.5
    assert trained.encoder is not None
    features = trained.encoder(samples.flatten(1))
    written = [trained.adapt(head(), (inputs, labels)).state_dict() for inputs in (pixels, samples, features)]
    for state in written[1:]:
        # Features close together: their float32 rounding counts for more in their own frame.
        torch.testing.assert_close(state["weight"], written[0]["weight"], rtol=1e-4, atol=1e-5)


def test_an_npz_of_features_is_support_too(bundle: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "s.npz", x=rng.normal(size=(4, FEATURES)).astype(np.float32), y=np.array([0, 1, 0, 1]))
    assert adapt(config(bundle, tmp_path / "s.npz", tmp_path / "h.safetensors")).classes == ("0", "1")


def test_labels_with_a_gap_are_refused(bundle: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", x=np.zeros((2, FEATURES), np.float32), y=np.array([0, 2]))
    with pytest.raises(ConditionError, match="without a gap"):
        adapt(config(bundle, tmp_path / "s.npz", tmp_path / "h.safetensors"))


def test_a_module_of_another_kind_is_refused_by_name(bundle: Path) -> None:
    with pytest.raises(UnknownLayoutError, match=r"it knows weight \[3, 8\]"):
        raywgen.load(bundle).adapt(nn.Linear(FEATURES + 1, WAY), images())


def test_whole_networks_are_adapted_to_their_samples(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_bundle(McDi(CONFIG, normalizers(SMALL), DATA).eval(), tmp_path / "generator", {})
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "s.npz", x=rng.normal(size=(8, 6)).astype(np.float32), y=np.arange(8) % 2)
    found = adapt(config(tmp_path, tmp_path / "s.npz", tmp_path / "n.safetensors"))
    network().load_state_dict(load_file(found.path), strict=True)
    assert found.encode_ms == 0
    with pytest.raises(ConditionError, match=r"a sample has .* values, the generator was trained on 6"):
        adapt(config(tmp_path, class_folders(tmp_path / "support"), tmp_path / "n.safetensors"))


def test_support_must_be_named() -> None:
    with pytest.raises(ConfigError, match="support is empty"):
        load_config(AdaptConfig, None, [])


def test_an_optimiser_is_asked_for_by_its_name_or_a_part_of_it(tmp_path: Path) -> None:
    layout = Layout.from_state_dict(head().state_dict())
    known = Normalizer(layout, torch.zeros(2), torch.ones(2))
    data = DataSpec(num_features=FEATURES, max_classes=WAY, policies=("adam", "adam-sam0.05", "sgd"))
    generator = LoHp(
        LoHpConfig(network=NetworkConfig(width=16, num_layers=1)), {layout.id: (layout, known)}, data
    ).eval()
    torch.nn.init.normal_(generator.policy.names_net)
    save_bundle(generator, tmp_path, {})
    trained = raywgen.load(tmp_path)
    support = torch.randn(6, FEATURES), torch.arange(6) % WAY
    weights = {name: trained.adapt(head(), support, policy=name).state_dict() for name in ("", "sam", "sgd")}
    full = trained.adapt(head(), support, policy="adam-sam0.05").state_dict()
    assert torch.equal(weights["sam"]["weight"], full["weight"])
    assert not torch.equal(weights["sam"]["weight"], weights["sgd"]["weight"])
    assert not torch.equal(weights[""]["weight"], weights["sgd"]["weight"])
    for policy in ("ada", "lion"):
        with pytest.raises(ConditionError, match=rf"policy={policy}: give one of adam, adam-sam0.05, sgd"):
            trained.adapt(head(), support, policy=policy)


def test_a_generator_that_learns_no_optimisers_says_so(bundle: Path) -> None:
    with pytest.raises(ConditionError, match="leave it out; 'mcdi' learns none"):
        raywgen.load(bundle).adapt(head(), images(), policy="sam")
