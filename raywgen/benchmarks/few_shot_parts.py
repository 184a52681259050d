"""Training for the few-shot benchmark: encoder, heads, generators, Reptile."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from raywgen.benchmarks.few_shot_config import FewShotConfig
from raywgen.benchmarks.recipes import folder_of
from raywgen.benchmarks.trained import Chosen, trained_generators, trained_zoo
from raywgen.config import SHIPPED, load_config
from raywgen.corpus import Corpus
from raywgen.evaluation.few_shot import ReptileState, one_thread, train_reptile, warm_start
from raywgen.generators import Generator
from raywgen.progress import Reporter
from raywgen.tasks.encoder_training import EncoderConfig, train_encoder
from raywgen.tasks.encoders import FrozenEncoder, load_encoder
from raywgen.tasks.episodes import Episode, EpisodeSampler
from raywgen.tasks.features import Statistics, encode_images
from raywgen.tasks.image_tasks import classes_of, images_in, images_of
from raywgen.tasks.images import ImageData, channel_statistics, normalise
from raywgen.tasks.networks.conv4 import Conv4
from raywgen.training.session import ray_session
from raywgen.weights import Layout, load_state_dict, save_state_dict
from raywgen.zoo import ZooConfig

_RECIPE = SHIPPED / "zoo" / "omniglot-heads.yaml"
_SIZE, _CHANNELS = 28, 1
_VALIDATION_SEED, _TEST_SEED = 101, 202


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSource:
    """The source of tasks; by default all come from the plain data.

    Attributes:
        domains: Domains that meta-training tasks alternate between, then the unseen one, as a zoo's `tasks.domains`.
        test_path: Images to test on, with all of their classes; by default unseen classes of the data.
        test_domain: Domain of the test episodes.
    """

    domains: tuple[str, ...] = ()
    test_path: str = ""
    test_domain: str = "plain"


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """The episodes for the choice of settings, or for the test.

    Attributes:
        features: B episodes through the encoder.
        pixels: The same episodes on pixels.
        statistics: Mean and standard deviation that pixels are standardised by.
    """

    features: Episode
    pixels: EpisodeSampler
    statistics: Statistics

    def prepare(self, x_SCHW: Tensor) -> Tensor:
        """Turns uint8 pixels into the floats that networks take."""
        mean, std = self.statistics
        return normalise(x_SCHW, mean=mean, std=std)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The trained parts that are compared, for one seed.

    Attributes:
        seed: Seed of everything.
        encoder: The frozen encoder.
        encoder_accuracy: Its accuracy on validation episodes.
        corpus: The heads that generators are trained on.
        generators: Generators by the names of their figures.
        layout: Layout of the heads.
        reptile: The meta-learned start of the whole network.
        network: A network of its architecture.
        validation: Episodes of validation classes, on which settings are chosen.
        test: Episodes of unseen classes.
    """

    seed: int
    encoder: FrozenEncoder
    encoder_accuracy: float
    corpus: Corpus
    generators: dict[str, Generator]
    layout: Layout
    reptile: ReptileState
    network: nn.Module
    validation: Side
    test: Side


def build_parts(config: FewShotConfig, root: str, seed: int, source: TaskSource) -> Parts:
    """Trains the parts that no earlier run of the same recipe has kept."""
    encoder_folder, encoder_accuracy = trained_encoder(config, root, seed)
    encoder = load_encoder(encoder_folder)
    with ray_session():
        corpus = trained_zoo(root, heads_zoo(config, seed, encoder_folder, source))
        generators = heads_generators(config, root, seed, corpus, config.variants())
    (facts,) = corpus.networks.values()
    network = Conv4(num_classes=config.way, in_channels=_CHANNELS, image_size=_SIZE)
    parts = Parts(
        seed=seed,
        encoder=encoder,
        encoder_accuracy=encoder_accuracy,
        corpus=corpus,
        generators=generators,
        layout=facts.layout,
        reptile=ReptileState.of(network),
        network=network,
        validation=validation_side(config, encoder, seed),
        test=test_side(config, encoder, seed, source),
    )
    return replace(parts, reptile=_reptile(config, root, parts, source)) if config.reptile_episodes else parts


def validation_side(config: FewShotConfig, encoder: FrozenEncoder, seed: int) -> Side:
    """Returns the episodes of validation classes of the plain data."""
    classes = classes_of(images_of(config.data, _SIZE, _CHANNELS, None), "validation", config.group, seed)
    return _side(config, encoder, (config.data, "plain"), classes, _VALIDATION_SEED, config.num_validation)


def test_side(config: FewShotConfig, encoder: FrozenEncoder, seed: int, source: TaskSource) -> Side:
    """Returns the test episodes of a task source, the same rows of images whatever the domain."""
    path = source.test_path or config.data
    split, group = ("all", "") if source.test_path else ("test", config.group)
    classes = classes_of(images_of(path, _SIZE, _CHANNELS, None), split, group, seed)
    return _side(config, encoder, (path, source.test_domain), classes, _TEST_SEED, config.num_episodes)


def _side(
    config: FewShotConfig, encoder: FrozenEncoder, source: tuple[str, str], classes: Sequence[int], seed: int, num: int
) -> Side:
    path, domain = source
    images = images_in(path, domain, _SIZE, _CHANNELS)
    statistics = channel_statistics(images_of(path, _SIZE, _CHANNELS, None).x_SCHW)
    features = encode_images(images, encoder, rotations=False, statistics=statistics)

    def episodes(data: ImageData) -> EpisodeSampler:
        return EpisodeSampler(data, classes, way=config.way, shot=config.shot, num_query=config.num_query, seed=seed)

    return Side(features=episodes(features).batch(0, num), pixels=episodes(images), statistics=statistics)


def trained_encoder(config: FewShotConfig, root: str, seed: int) -> tuple[str, float]:
    """Returns the folder of the frozen encoder, and its accuracy on validation episodes."""
    recipe = EncoderConfig(
        path=config.data,
        size=_SIZE,
        channels=_CHANNELS,
        group=config.group,
        seed=seed,
        num_episodes=config.encoder_episodes,
        way=config.encoder_way,
        domains=config.encoder_domains,
        validate_every=max(1, config.encoder_episodes // 5),
    )
    recipe = replace(recipe, out=folder_of(root, "encoder", recipe.recipe()))
    with Reporter().step("encoder", f"Conv-4 into {recipe.out}") as bar:
        card = train_encoder(recipe, bar.named)
    return recipe.out, float(card.facts["validation_accuracy"])


def heads_zoo(config: FewShotConfig, seed: int, encoder: str, source: TaskSource) -> ZooConfig:
    """Returns the recipe of the heads that generators are trained on."""
    return load_config(
        ZooConfig,
        _RECIPE,
        [
            f"tasks.path={config.data}",
            f"tasks.encoder={encoder}",
            f"tasks.group={config.group}",
            f"tasks.way={config.way}",
            f"networks=[{{name: head, num_features: 64, num_classes: {config.way}}}]",
            f"tasks.domains=[{','.join(json.dumps(domain) for domain in source.domains)}]",
            f"num_seen_tasks={config.num_tasks}",
            f"num_validation_tasks={max(4, config.num_tasks // 40)}",
            "num_unseen_tasks=0",
            f"seed={seed}",
        ],
    )


def heads_generators(
    config: FewShotConfig, root: str, seed: int, corpus: Corpus, chosen: Chosen
) -> dict[str, Generator]:
    """Trains generators of heads, whose conditions have `shot` images of each class."""
    return trained_generators(
        config,
        root,
        corpus,
        chosen,
        shot=config.shot,
        seed=seed,
        num_query_samples=10 * config.way,
    )


def _reptile(config: FewShotConfig, root: str, parts: Parts, source: TaskSource) -> ReptileState:
    """Meta-trains Reptile on the classes and domains of the heads, from the encoder's own values."""
    recipe = dataclasses.asdict(config.reptile) | {"encoder": parts.encoder.fingerprint, "way": config.way}
    recipe |= {"known": source.domains[:-1]}
    path = Path(folder_of(root, "reptile", recipe)) / "state.safetensors"
    if path.is_file():
        return ReptileState.from_tensors(load_state_dict(path))
    warm_start(parts.network, parts.encoder.module.state_dict())
    data, classes = known_images(config, parts.seed, source)
    sampler = EpisodeSampler(
        data, classes, way=config.way, shot=config.reptile.train_shots, num_query=1, seed=parts.seed, rotations=True
    )
    step = Reporter().step("reptile", f"meta-train the whole network into {path.parent}")
    with one_thread(), step as bar:
        state = train_reptile(
            parts.network,
            sampler,
            config.reptile,
            prepare=parts.validation.prepare,
            num_workers=os.cpu_count() or 1,
            on_progress=bar.update,
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    save_state_dict(state.tensors(), path, {"format": "raywgen reptile"})
    return state


def known_images(config: FewShotConfig, seed: int, source: TaskSource) -> tuple[ImageData, list[int]]:
    """Returns the images of all known domains of a source as one data set, and its classes for meta-training."""
    images, labels, names, classes = [], [], [], []
    for domain_name in source.domains[:-1] or ("plain",):
        path, _, domain = domain_name.rpartition("::")
        data = images_in(path or config.data, domain, _SIZE, _CHANNELS)
        chosen = classes_of(data, "all" if path else "train", "" if path else config.group, seed)
        classes += [len(names) + number for number in chosen]
        images.append(data.x_SCHW)
        labels.append(data.y_S + len(names))
        names += [f"{domain_name}/{name}" for name in data.class_names]
    joined = ImageData(
        name="known", x_SCHW=torch.cat(images), y_S=torch.cat(labels), class_names=tuple(names), source=config.data
    )
    return joined, classes
