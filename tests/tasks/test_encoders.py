from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raywgen.sealed import sealed_json, unseal
from raywgen.tasks import TaskError
from raywgen.tasks.encoders import (
    CARD,
    WEIGHTS,
    EncoderCard,
    EncoderError,
    FrozenEncoder,
    encoder_kind,
    load_encoder,
    read_card,
    save_encoder,
)
from raywgen.tasks.networks import Conv4
from raywgen.trust import trusting

NETWORK = {"name": "conv4", "in_channels": 1, "width": 4, "image_size": 16}
HERE = "tests.tasks.test_encoders"


def card(**changes: object) -> EncoderCard:
    fields = {"network": NETWORK, "size": 16, "channels": 1, "mean": (0.2,), "std": (0.3,), "facts": {"seed": 3}}
    return EncoderCard(**(fields | changes))  # pyright: ignore[reportArgumentType]


def conv4(seed: int = 0) -> Conv4:
    torch.manual_seed(seed)
    return Conv4(1, width=4, image_size=16)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    save_encoder(conv4().state_dict(), card(), str(tmp_path / "encoder"))
    return str(tmp_path / "encoder")


@pytest.fixture(autouse=True)
def _own_word(tmp_path: Path) -> Iterator[None]:
    with trusting(f"hf:{tmp_path}", "hf:facebook", "pathlib"):
        yield


class Corner(nn.Module):
    """The first values of each image."""

    input_shape = (1, 4, 4)

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(3))

    def forward(self, x_SCHW: torch.Tensor) -> torch.Tensor:
        return x_SCHW[:, 0, 0, :3] * self.scale


class Unflat(Corner):
    def forward(self, x_SCHW: torch.Tensor) -> torch.Tensor:
        return x_SCHW


class NotANumber(Corner):
    def forward(self, x_SCHW: torch.Tensor) -> torch.Tensor:
        return super().forward(x_SCHW) / 0


def test_a_folder_gives_the_frozen_network_back(folder: str) -> None:
    encoder = load_encoder(folder)
    x_SF = torch.randn(5, 256)
    torch.testing.assert_close(encoder(x_SF), conv4().eval()(x_SF))
    assert encoder(x_SF).shape == (5, 4)
    assert not encoder(x_SF.requires_grad_()).requires_grad
    assert not encoder.train().training
    assert not any(module.training for module in encoder.modules() if module is not encoder)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    found = read_card(folder)
    assert (found.network, found.size, found.channels, found.facts) == (NETWORK, 16, 1, {"seed": 3})
    assert [*found.mean, *found.std] == [0.2, 0.3]


def test_statistics_of_other_images_make_another_encoder_and_leave_it_as_it_is() -> None:
    encoder = FrozenEncoder(conv4(), name="own", identity="")
    images = torch.randn(6, 256, generator=torch.Generator().manual_seed(0))
    before, pale = encoder.fingerprint, images / 4
    other = encoder.normalised_by(images)
    assert encoder.fingerprint == before != other.fingerprint
    # What it makes of these images is then what a batch in training mode would get, but for the variance's divisor.
    trained = conv4().train()
    torch.testing.assert_close(other(images), trained(images), rtol=0.1, atol=0.1)
    blocks = other.last_blocks(images)
    assert [tuple(block.shape) for block in blocks] == [(6, 16), (6, 4)]
    assert torch.equal(blocks[-1], other(images))
    torch.testing.assert_close(encoder.normalised_by(pale)(pale), other(images), rtol=1e-2, atol=1e-2)
    assert encoder.shift_of(encoder) == 0
    assert other.shift_of(other.normalised_by(images[:3])) < 0.1
    # A quarter of the contrast: KL(N(0, 1/16) || N(0, 1)).
    assert other.shift_of(other.normalised_by(pale)) == pytest.approx((1 / 16 - 1 + math.log(16)) / 2, rel=0.02)


def test_a_folder_is_read_from_a_uri_and_replaced(folder: str) -> None:
    before = load_encoder(folder).fingerprint
    assert load_encoder(f"file://{folder}").fingerprint == before
    save_encoder(conv4(1).state_dict(), card(), f"file://{folder}")
    assert load_encoder(folder).fingerprint != before


def test_the_fingerprint_tells_values_and_networks_apart(tmp_path: Path) -> None:
    state = conv4().state_dict()
    changed = {name: tensor.clone() for name, tensor in state.items()}
    changed["blocks.3.bn.running_var"][0] += 1e-6
    same, other, network = (str(tmp_path / name) for name in ("same", "other", "network"))
    save_encoder(state, card(facts={"seed": 4}), same)
    save_encoder(changed, card(), other)
    save_encoder(state, card(network=NETWORK | {"image_size": 17}), network)
    first = load_encoder(same).fingerprint
    save_encoder(state, card(), same)
    assert load_encoder(same).fingerprint == first
    assert len({first, load_encoder(other).fingerprint, load_encoder(network).fingerprint}) == 3


def test_a_module_by_import_path_has_the_values_of_a_fixed_seed() -> None:
    name = f"{HERE}:Corner"
    x_SF = torch.randn(6, 16)
    features_SE = load_encoder(name)(x_SF)
    assert features_SE.shape == (6, 3)
    torch.manual_seed(11)
    torch.testing.assert_close(load_encoder(name)(x_SF), features_SE, rtol=0, atol=0)
    assert (
        load_encoder(name).fingerprint == load_encoder(name).fingerprint != load_encoder(f"{HERE}:Unflat").fingerprint
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("runs/encoders/omniglot", "folder"),
        ("s3://bucket/encoder", "folder"),
        ("hf://models/encoder", "folder"),
        ("package.module:Class", "import"),
        ("hf:facebook/dinov2-small", "hub"),
        ("hf:resnet", "hub"),
    ],
)
def test_the_form_of_a_name_says_how_it_is_read(name: str, kind: str) -> None:
    assert encoder_kind(name) == kind


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("", 16, "encoder is empty; give a folder"),
        ("no/such/folder", 16, "no encoder in 'no/such/folder'.*encoder train"),
        (f"{HERE}:Nothing", 16, "cannot import"),
        ("pathlib:Path", 16, "is no subclass of torch.nn.Module"),
        (f"{HERE}:Corner", 17, "does not take samples of 17 values"),
        (f"{HERE}:Unflat", 16, r"makes \[2, 1, 4, 4\] of 2 samples"),
        (f"{HERE}:NotANumber", 16, "NaN or infinite features"),
    ],
)
def test_encoders_that_cannot_be_used_say_why(name: str, size: int, message: str) -> None:
    with pytest.raises(EncoderError, match=message):
        load_encoder(name)(torch.randn(2, size))


def test_a_wrong_size_is_refused_with_the_right_one(folder: str) -> None:
    with pytest.raises(EncoderError, match=r"samples of 784 values.*takes images of 16 x 16 pixels and 1 channels"):
        load_encoder(folder)(torch.randn(2, 784))


def test_a_damaged_folder_is_named(folder: str) -> None:
    weights, card_path = Path(folder) / WEIGHTS, Path(folder) / CARD
    whole, text = weights.read_bytes(), card_path.read_text()
    for content in (whole[:-7], whole[:-1] + bytes([whole[-1] ^ 1])):
        weights.write_bytes(content)
        with pytest.raises(EncoderError, match=f"{WEIGHTS} is damaged"):
            load_encoder(folder)
    weights.write_bytes(whole)
    for content in ("", text[:50], json.dumps({"network": NETWORK}), "[]"):
        card_path.write_text(content)
        with pytest.raises(EncoderError, match=f"{CARD} is damaged"):
            load_encoder(folder)
    card_path.write_text(text.replace('"width": 4', '"width": 5'))
    with pytest.raises(EncoderError, match=f"{CARD} is damaged.*changed since it was written"):
        load_encoder(folder)
    content = unseal(text)
    content["network"]["width"] = 5
    card_path.write_text(sealed_json(content))
    with pytest.raises(EncoderError, match="does not fit the network"):
        load_encoder(folder)
    card_path.write_text(text)
    weights.unlink()
    with pytest.raises(EncoderError, match="there is no encoder"):
        load_encoder(folder)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EncoderError, match="cannot write the encoder"):
        save_encoder(conv4().state_dict(), card(), str(tmp_path / "file" / "encoder"))


def test_without_transformers_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(TaskError, match=r"pip install 'raywgen\[hub\]'"):
        load_encoder("hf:facebook/dinov2-small")


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_vision_model_of_transformers(kind: str, tmp_path: Path) -> None:
    import transformers

    if kind == "vit":
        sizes: dict[str, Any] = {
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 8,
        }
        config = transformers.ViTConfig(**sizes, image_size=16, patch_size=8)
        model, width = transformers.ViTModel(config), 8
    else:
        config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic")
        model, width = transformers.ResNetModel(config), 6
    model.save_pretrained(tmp_path)
    encoder = load_encoder(f"hf:{tmp_path}")
    grey_SF = torch.randn(3, 784)
    features_SE = encoder(grey_SF)
    assert features_SE.shape == (3, width)
    images_SCHW = grey_SF.view(3, 1, 28, 28).expand(-1, 3, -1, -1)
    torch.testing.assert_close(encoder(images_SCHW.flatten(1)), features_SE)
    if kind == "vit":
        images_SCHW = nn.functional.interpolate(images_SCHW, size=(16, 16), mode="bilinear", antialias=True)
    with torch.no_grad():
        expected_SE = model.eval()(pixel_values=images_SCHW).pooler_output.flatten(1)
    torch.testing.assert_close(features_SE, expected_SE)
    assert encoder.fingerprint == load_encoder(f"hf:{tmp_path}").fingerprint


def test_a_pooler_without_values_is_not_used(tmp_path: Path) -> None:
    import transformers

    sizes: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=16, patch_size=8), add_pooling_layer=False)
    model.save_pretrained(tmp_path)
    x_SF = torch.randn(2, 768)
    with torch.no_grad():
        hidden_STE = model.eval()(pixel_values=x_SF.view(2, 3, 16, 16)).last_hidden_state
    torch.testing.assert_close(load_encoder(f"hf:{tmp_path}")(x_SF), hidden_STE.mean(dim=1))


def test_a_text_model_is_refused(tmp_path: Path) -> None:
    import transformers

    sizes: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=10)).save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match="takes input_ids, not images; give a vision model"):
        load_encoder(f"hf:{tmp_path}")
