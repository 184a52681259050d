"""A frozen encoder of the samples: what the prior then sees, and that a bundle finds it again.

Shape legend: B networks, S samples, F values of a sample, E features.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from raywgen.corpus import Corpus
from raywgen.generation import load
from raywgen.generators import DataSpec, GenerationRequest
from raywgen.generators.bundle import BundleError, load_bundle, save_bundle
from raywgen.generators.igpg import IGPG, PriorConfig
from raywgen.generators.igpg.data_encoder import DataEncoder
from raywgen.sealed import sealed_json, unseal
from raywgen.tasks import build_network
from raywgen.tasks.encoders import EncoderCard, EncoderError, save_encoder
from raywgen.tasks.networks import Conv4
from raywgen.training import TrainConfig, launch
from raywgen.trust import trusting
from tests.builders import condition, igpg, igpg_config, layout_of, noise_for, normalizers, train, weight_batch

HERE = "tests.generators.igpg.test_data_encoder"
NETWORK = {"name": "conv4", "in_channels": 1, "width": 4, "image_size": 16}


class Halves(nn.Module):
    """Three features of six values; counts the samples that it is given."""

    seen = 0
    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3))

    def forward(self, x_SF: Tensor) -> Tensor:
        Halves.seen += len(x_SF)
        return self.scale * self.weight * (x_SF[:, :3] - x_SF[:, 3:6])


def config_with(data_encoder: str):
    generator = igpg_config()
    return replace(generator, prior=replace(generator.prior, data_encoder=data_encoder))


@pytest.fixture
def generator() -> IGPG:
    return igpg(config_with(f"{HERE}:Halves"))


@pytest.fixture
def conv4(tmp_path: Path) -> str:
    torch.manual_seed(0)
    card = EncoderCard(network=NETWORK, size=16, channels=1, mean=(0.2,), std=(0.3,))
    save_encoder(Conv4(1, width=4, image_size=16).state_dict(), card, str(tmp_path / "encoder"))
    return str(tmp_path / "encoder")


def images(num: int = 3):
    samples_BSF = torch.randn(num, 4, 256, generator=torch.Generator().manual_seed(0))
    return replace(condition(num, num_samples=4), samples_BSF=samples_BSF)


def on_images(data_encoder: str) -> IGPG:
    torch.manual_seed(0)
    return IGPG(config_with(data_encoder), normalizers(), DataSpec(num_features=256, max_classes=2)).eval()


def test_the_prior_sees_features_in_place_of_samples(generator: IGPG) -> None:
    """The same prior without an encoder, conditioned on the features themselves, writes the same."""
    assert generator.prior.data is not None
    torch.manual_seed(0)
    plain = IGPG(igpg_config(), normalizers(), DataSpec(num_features=3, max_classes=2)).eval()
    state = {name: tensor for name, tensor in generator.state_dict().items() if not name.startswith("prior.data.")}
    plain.load_state_dict(state)
    asked = condition(4)
    features_BSE = generator.prior.data(asked.samples_BSF)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # What `load_encoder` draws by.
        encoder = Halves()
    torch.testing.assert_close(features_BSE, encoder(asked.samples_BSF.flatten(0, 1)).detach().unflatten(0, (4, -1)))
    written = generator.generate(GenerationRequest(condition=asked, layout=layout_of(), noise=noise_for(4)))
    same = plain.generate(
        GenerationRequest(condition=replace(asked, samples_BSF=features_BSE), layout=layout_of(), noise=noise_for(4))
    )
    assert torch.equal(written.values_BD, same.values_BD)
    other = plain.generate(
        GenerationRequest(condition=replace(asked, samples_BSF=-features_BSE), layout=layout_of(), noise=noise_for(4))
    )
    assert not torch.equal(written.values_BD, other.values_BD), "the features must matter"


def test_without_one_nothing_is_added() -> None:
    assert PriorConfig().data_encoder == ""
    assert igpg().prior.data is None
    assert not [name for name in igpg().state_dict() if name.startswith("prior.data")]
    assert igpg().encoders() == {}


def test_the_encoder_is_neither_trained_nor_saved(generator: IGPG) -> None:
    assert [name for name in generator.state_dict() if name.startswith("prior.data")] == ["prior.data.probe_1E"]
    assert not [name for name, _ in generator.named_parameters() if name.startswith("prior.data")]
    assert generator.prior.data is not None
    before = generator.prior.data(condition(2).samples_BSF)
    for stage in generator.stages()[1:]:
        losses = train(stage, [weight_batch(seed=seed) for seed in range(3)])
        assert all(loss == loss for loss in losses)
    generator.prior.data._kept.clear()
    assert torch.equal(generator.prior.data(condition(2).samples_BSF), before)


def test_each_sample_is_encoded_once_and_by_itself(generator: IGPG) -> None:
    encoder, samples_BSF = generator.prior.data, condition(3).samples_BSF
    assert encoder is not None
    Halves.seen = 0
    all_BSE = encoder(samples_BSF.repeat_interleave(5, dim=0))
    assert Halves.seen == samples_BSF.shape[0] * samples_BSF.shape[1]
    encoder(samples_BSF.flip(1))
    assert Halves.seen == samples_BSF.shape[0] * samples_BSF.shape[1]
    fresh = DataEncoder(f"{HERE}:Halves", 6)
    assert torch.equal(fresh(samples_BSF[1:2, 3:5]), all_BSE[5:6, 3:5])


def test_features_that_are_kept_are_bounded(generator: IGPG, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raywgen.generators.igpg.data_encoder._KEPT_VALUES", 30)
    encoder = generator.prior.data
    assert encoder is not None
    samples_BSF = condition(3).samples_BSF
    features_BSE = encoder(samples_BSF)
    assert len(encoder._kept) == 10
    assert torch.equal(encoder(samples_BSF), features_BSE)


def test_a_bundle_finds_an_encoder_by_its_import_path(generator: IGPG, tmp_path: Path) -> None:
    save_bundle(generator, tmp_path, {})
    loaded = load_bundle(tmp_path)
    assert loaded.config == generator.config
    before, after = (
        each.generate(GenerationRequest(condition=condition(3), layout=layout_of(), noise=noise_for(3)))
        for each in (generator, loaded)
    )
    assert torch.equal(before.values_BD, after.values_BD)
    assert not (tmp_path / "data_encoder").exists()


def test_a_missing_encoder_is_named(generator: IGPG, tmp_path: Path) -> None:
    save_bundle(generator, tmp_path, {})
    path = tmp_path / "generator.json"
    content = unseal(path.read_bytes())
    content["config"]["prior"]["data_encoder"] = "gone.away:Halves"
    path.write_text(sealed_json(content))
    with (
        trusting("gone"),
        pytest.raises(EncoderError, match=r"needs the encoder that it was trained with.*gone\.away:Halves"),
    ):
        load_bundle(tmp_path)


def test_another_encoder_of_that_name_is_refused(
    generator: IGPG, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_bundle(generator, tmp_path, {})
    monkeypatch.setattr(Halves, "scale", 1.00001)
    load_bundle(tmp_path)
    monkeypatch.setattr(Halves, "scale", 1.01)
    with pytest.raises(EncoderError, match="not those that this generator was trained on"):
        load_bundle(tmp_path)


def test_a_bundle_holds_a_copy_of_an_encoder_in_a_folder(conv4: str, tmp_path: Path) -> None:
    generator = on_images(conv4)
    before = generator.generate(GenerationRequest(condition=images(), layout=layout_of(), noise=noise_for(3)))
    save_bundle(generator, tmp_path / "bundle", {})
    shutil.rmtree(conv4)
    shutil.move(tmp_path / "bundle", tmp_path / "moved")
    assert str(tmp_path) not in (tmp_path / "moved" / "generator.json").read_text()
    loaded = load_bundle(tmp_path / "moved")
    after = loaded.generate(GenerationRequest(condition=images(), layout=layout_of(), noise=noise_for(3)))
    assert torch.equal(before.values_BD, after.values_BD)
    save_bundle(loaded, tmp_path / "again", {})
    shutil.rmtree(tmp_path / "moved")
    assert (
        load_bundle(tmp_path / "again")
        .generate(GenerationRequest(condition=images(), layout=layout_of(), noise=noise_for(3)))
        .log_prob_B
        is not None
    )


def test_a_damaged_copy_is_named(conv4: str, tmp_path: Path) -> None:
    save_bundle(on_images(conv4), tmp_path / "bundle", {})
    (tmp_path / "bundle" / "data_encoder" / "encoder.safetensors").write_bytes(b"")
    with pytest.raises(BundleError, match="is damaged"):
        load_bundle(tmp_path / "bundle")


def test_an_encoder_of_other_images_is_refused_at_once(conv4: str) -> None:
    with pytest.raises(EncoderError, match=r"does not take samples of 6 values.*16 x 16"):
        igpg(config_with(conv4))


def test_a_relative_folder_means_the_same_in_a_worker(conv4: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(conv4).parent)
    assert PriorConfig(data_encoder="encoder").data_encoder == conv4
    assert PriorConfig(data_encoder="hf:some/name").data_encoder == "hf:some/name"
    assert PriorConfig(data_encoder="s3://bucket/encoder").data_encoder == "s3://bucket/encoder"


def test_a_run_trains_with_one_and_is_loaded_again(zoo_corpus: Corpus, tmp_path: Path) -> None:
    generator = config_with(f"{HERE}:Halves")
    generator = replace(
        generator,
        **{name: replace(getattr(generator, name), batch_size=4) for name in ("tokenizer", "prior", "task_loss")},
    )
    run = TrainConfig(generator=generator, corpus=zoo_corpus.location, out=str(tmp_path / "run"), num_workers=0)
    launch([run])
    trained = load(tmp_path / "run")
    task = next(iter(zoo_corpus.tasks.values()))
    module = build_network(next(iter(zoo_corpus.networks.values())).recipe)
    trained.fill(module, instruction="Is it?", data=(task.samples_SF, task.labels_S))
    assert all(tensor.isfinite().all() for tensor in module.state_dict().values())
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in rows} == {"tokenizer", "prior", "task_loss"}
