"""What the few-shot benchmark trains before it compares: encoder, heads, generators, Reptile."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from raywgen.benchmarks.recipes import folder_of
from raywgen.benchmarks.trained import mcdi_variants, trained_generators, trained_zoo
from raywgen.config import load_config
from raywgen.corpus import Corpus
from raywgen.evaluation.few_shot import ReptileState, one_thread, train_reptile, warm_start
from raywgen.generators import Generator
from raywgen.progress import Reporter
from raywgen.tasks.encoder_training import EncoderConfig, train_encoder
from raywgen.tasks.encoders import FrozenEncoder, load_encoder
from raywgen.tasks.episodes import Episode, EpisodeSampler
from raywgen.tasks.features import encode_images
from raywgen.tasks.image_tasks import classes_of, images_of
from raywgen.tasks.images import ImageData, channel_statistics, normalise
from raywgen.tasks.networks.conv4 import Conv4
from raywgen.training.session import ray_session
from raywgen.weights import Layout, load_state_dict, save_state_dict
from raywgen.zoo import ZooConfig

if TYPE_CHECKING:
    from raywgen.benchmarks.few_shot import Config

_RECIPE = Path(__file__).parents[2] / "configs" / "zoo" / "omniglot-heads.yaml"
_SIZE, _CHANNELS = 28, 1
_VALIDATION_SEED, _TEST_SEED = 101, 202


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """All that is compared, for one seed.

    Attributes:
        seed: Of everything.
        encoder: Frozen.
        encoder_accuracy: Its own, on validation episodes.
        generators: By the names of their figures.
        layout: Of the heads.
        reptile: The meta-learned start of the whole network.
        network: A network of its architecture.
        validation_episodes: On features, of classes that settings are chosen on.
        test_episodes: On features, of classes never seen.
        validation_pixels: The same episodes on pixels.
        test_pixels: Likewise.
        mean: Of the pixels of meta-training.
        std: Likewise.
    """

    seed: int
    encoder: FrozenEncoder
    encoder_accuracy: float
    generators: dict[str, Generator]
    layout: Layout
    reptile: ReptileState
    network: nn.Module
    validation_episodes: Episode
    test_episodes: Episode
    validation_pixels: EpisodeSampler
    test_pixels: EpisodeSampler
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def prepare(self, x_SCHW: Tensor) -> Tensor:
        """Pixels uint8 to the floats that networks take."""
        return normalise(x_SCHW, mean=self.mean, std=self.std)


def build_parts(config: Config, root: str, seed: int) -> Parts:
    """Trains what is not kept from an earlier run of the same recipe."""
    encoder_folder, encoder_accuracy = _encoder(config, root, seed)
    encoder = load_encoder(encoder_folder)
    with ray_session():
        corpus, generators = _generators(config, root, seed, encoder_folder)
    (facts,) = corpus.networks.values()
    data = images_of(config.data, _SIZE, _CHANNELS, None)
    tested = images_of(config.test_data, _SIZE, _CHANNELS, None) if config.test_data else data
    validation = classes_of(data, "validation", config.group, seed)
    test = range(len(tested.class_names)) if config.test_data else classes_of(data, "test", config.group, seed)
    mean, std = channel_statistics(data.x_SCHW)
    network = Conv4(num_classes=config.way, in_channels=_CHANNELS, image_size=_SIZE)
    sides = {}
    for name, images, classes, sampler_seed, num in (
        ("validation", data, validation, _VALIDATION_SEED, config.num_validation),
        ("test", tested, test, _TEST_SEED, config.num_episodes),
    ):
        features = encode_images(images, encoder, rotations=False)
        sides[f"{name}_episodes"] = _episodes(config, features, list(classes), sampler_seed).batch(0, num)
        sides[f"{name}_pixels"] = _episodes(config, images, list(classes), sampler_seed)
    parts = Parts(
        seed=seed,
        encoder=encoder,
        encoder_accuracy=encoder_accuracy,
        generators=generators,
        layout=facts.layout,
        reptile=ReptileState.of(network),
        network=network,
        mean=mean,
        std=std,
        **sides,
    )
    return replace(parts, reptile=_reptile(config, root, parts, data)) if config.reptile_episodes else parts


def _episodes(config: Config, data: ImageData, classes: list[int], seed: int) -> EpisodeSampler:
    return EpisodeSampler(data, classes, way=config.way, shot=config.shot, num_query=config.num_query, seed=seed)


def _encoder(config: Config, root: str, seed: int) -> tuple[str, float]:
    recipe = EncoderConfig(
        path=config.data,
        size=_SIZE,
        channels=_CHANNELS,
        group=config.group,
        seed=seed,
        num_episodes=config.encoder_episodes,
        validate_every=max(1, config.encoder_episodes // 5),
    )
    recipe = replace(recipe, out=folder_of(root, "encoder", recipe.recipe()))
    with Reporter().step("encoder", f"Conv-4 into {recipe.out}") as bar:
        card = train_encoder(recipe, bar.named)
    return recipe.out, float(card.facts["validation_accuracy"])


def _generators(config: Config, root: str, seed: int, encoder: str) -> tuple[Corpus, dict[str, Generator]]:
    zoo = load_config(
        ZooConfig,
        _RECIPE,
        [
            f"tasks.path={config.data}",
            f"tasks.encoder={encoder}",
            f"tasks.group={config.group}",
            f"tasks.way={config.way}",
            f"networks=[{{name: head, num_features: 64, num_classes: {config.way}}}]",
            f"num_seen_tasks={config.num_tasks}",
            f"seed={seed}",
        ],
    )
    corpus = trained_zoo(root, zoo)
    generators = trained_generators(
        root,
        corpus,
        mcdi_variants(config.mcdi, config.functional),
        shot=config.shot,
        seed=seed,
        num_workers=config.num_workers,
        num_query_samples=10 * config.way,
    )
    return corpus, generators


def _reptile(config: Config, root: str, parts: Parts, data: ImageData) -> ReptileState:
    """Meta-trained on the classes that encoder and heads were trained on, from the encoder's own values."""
    recipe = dataclasses.asdict(config.reptile) | {"encoder": parts.encoder.fingerprint, "way": config.way}
    path = Path(folder_of(root, "reptile", recipe)) / "state.safetensors"
    if path.is_file():
        return ReptileState.from_tensors(load_state_dict(path))
    warm_start(parts.network, parts.encoder.module.state_dict())
    classes = list(classes_of(data, "train", config.group, parts.seed))
    sampler = EpisodeSampler(
        data, classes, way=config.way, shot=config.reptile.train_shots, num_query=1, seed=parts.seed, rotations=True
    )
    step = Reporter().step("reptile", f"meta-train the whole network into {path.parent}")
    with one_thread(), step as bar:
        state = train_reptile(
            parts.network,
            sampler,
            config.reptile,
            prepare=parts.prepare,
            num_workers=os.cpu_count() or 1,
            on_progress=bar.update,
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    save_state_dict(state.tensors(), path, {"format": "raywgen reptile"})
    return state
