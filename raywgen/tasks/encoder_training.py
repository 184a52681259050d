"""Trains an encoder for few-shot tasks as a prototypical network, on the classes that episodes are trained on.

Source: Snell et al., "Prototypical Networks for Few-shot Learning", NeurIPS 2017, equations 1 and 2. As there, images
of a class turned by a quarter are their own class, and an episode of training has more classes than one of testing.
Where the paper halves the learning rate every 2,000 episodes, it falls along a cosine to zero here, and images are
shifted by a few pixels, so that few episodes suffice.

Shape legend: B episodes, N classes of an episode, S support samples, Q query samples, T images of an episode in all,
E features, C channels, H height, W width.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from raywgen.locks import only_one
from raywgen.nn.precision import Precision, autocast, resolved
from raywgen.out_folder import checked_out
from raywgen.tasks.augment import augment, background
from raywgen.tasks.base import TaskError
from raywgen.tasks.encoders import EncoderCard, EncoderError, FrozenEncoder, read_card, save_encoder
from raywgen.tasks.episodes import EpisodeSampler
from raywgen.tasks.features import Statistics, encode, feature_data, turned_classes
from raywgen.tasks.image_classes import class_subset
from raywgen.tasks.image_tasks import classes_of, images_of, in_domain
from raywgen.tasks.images import ImageData, channel_statistics, normalise
from raywgen.tasks.networks import build_network
from raywgen.trust import entry_point

OnProgress = Callable[[int, int, str], None]
_WAY, _NUM_QUERY = 5, 15  # Sizes of a validation episode.
_EPISODES_OF_A_BATCH = 50
_PLAIN = ("plain",)
_DOMAIN_STREAM = 1 << 40  # Away from the seeds of the shifts.
_STEP_STRIDE = 1 << 20


@dataclass(kw_only=True)
class EncoderConfig:
    """The settings by which a Conv-4 encoder is trained.

    Attributes:
        path: Images: a Parquet file, glob, `hf://` name, folder of class folders, or `digits`.
        size: Images are scaled to `size x size`.
        channels: 1 or 3.
        group: Column whose groups stay in one split of the classes, such as `alphabet`.
        rotations: Whether turned classes are classes of their own.
        seed: Seed of everything, including the split of classes, which episode tasks of equal path, group and
            seed share.
        out: Folder of the encoder: a path or URI.
        width: Channels of every block; at 28 x 28 pixels also the number of features.
        way: Classes of a training episode.
        shot: Support images of each.
        num_query: Query images of each.
        num_episodes: Training episodes, one a step.
        learning_rate: Adam's rate at the first step; it falls along a cosine to zero.
        shift: Most pixels by which training images are shifted.
        domains: Domains that training images are seen in, such as `[plain, invert, scale-0.7]`: one that is drawn for
            each image, which is standardised as its domain is. Features then depend less on ink and size. Validation
            images are plain.
        precision: `bf16`, `fp32`, or `auto`: bf16 where the processor multiplies matrices in it.
        validate_every: Episodes between two validations; the encoder that was best at one is kept.
        validation_episodes: Episodes of each validation, with 5 classes (or all where there are fewer) and one support
            image each.

    Raises:
        ValueError: A value trains no encoder; the message names it.
    """

    path: str = ""
    size: int = 28
    channels: int = 1
    group: str = ""
    rotations: bool = True
    seed: int = 0
    out: str = "runs/encoders/encoder"
    width: int = 64
    way: int = 60
    shot: int = 1
    num_query: int = 4
    num_episodes: int = 1800
    learning_rate: float = 2e-3
    shift: int = 2
    domains: list[str] = field(default_factory=lambda: list(_PLAIN))
    precision: Precision = "auto"
    validate_every: int = 360
    validation_episodes: int = 400

    def __post_init__(self) -> None:
        for name in (
            "size",
            "width",
            "way",
            "shot",
            "num_query",
            "num_episodes",
            "validate_every",
            "validation_episodes",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.seed < 0 or self.shift < 0:
            raise ValueError(f"seed={self.seed}, shift={self.shift}: must be at least 0")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate={self.learning_rate}: must be above 0")
        if not self.domains:
            raise ValueError("domains is empty: give at least plain")

    def recipe(self) -> dict[str, Any]:
        """Returns the settings that decide the encoder: all but where it is stored."""
        recipe = {key: value for key, value in dataclasses.asdict(self).items() if key != "out"}
        # Encoders of older versions, which saw plain images, are found again.
        return recipe if self.domains != list(_PLAIN) else {k: v for k, v in recipe.items() if k != "domains"}

    def network(self) -> dict[str, Any]:
        """Returns the recipe that `build_network` takes."""
        return {"name": "conv4", "in_channels": self.channels, "width": self.width, "image_size": self.size}


@entry_point
def train_encoder(config: EncoderConfig, on_progress: OnProgress | None = None) -> EncoderCard:
    """Trains an encoder into `config.out`, unless a finished one of the same config is there.

    Args:
        config: The recipe.
        on_progress: Called with episodes done, episodes in all, and the loss and accuracy in words.

    Returns:
        The card of the encoder; its `facts` have `validation_accuracy` and `seconds`.

    Raises:
        TaskError: The images are not there, or their classes do not suffice.
        OutError: Nothing can or should be written to the folder.
        EncoderError: The folder cannot be written, or training diverged.
        InUseError: Another process works on the folder.
    """
    config = dataclasses.replace(config, out=checked_out(config.out, EncoderConfig.out))
    if (finished := _finished(config)) is not None:
        return finished
    if not config.path:
        raise EncoderError("path is empty: name the images, for instance path=omniglot-background.parquet")
    with only_one(config.out):
        return _finished(config) or _train(config, on_progress)


def _train(config: EncoderConfig, on_progress: OnProgress | None) -> EncoderCard:
    begin = time.monotonic()
    data = images_of(config.path, config.size, config.channels, None)
    training = _Training(config, data)
    best = training.run(on_progress)
    mean, std = training.statistics
    facts = {
        "data": data.name,
        "train_classes": [data.class_names[number] for number in training.classes],
        "validation_accuracy": best.accuracy,
        "episode": best.episode,
        "precision": training.precision,
        "torch": torch.__version__,
        "seconds": round(time.monotonic() - begin, 1),
        "recipe": config.recipe(),
    }
    centre, spread = training.feature_statistics(best)
    card = EncoderCard(
        network=config.network(),
        size=config.size,
        channels=config.channels,
        mean=mean,
        std=std,
        facts=facts,
        centre=centre,
        spread=spread,
    )
    save_encoder(best.state, card, config.out)
    return card


def prototype_logits(support_BSE: Tensor, query_BQE: Tensor, way: int) -> Tensor:
    """Returns `-||q - c_n||^2` with `c_n` the mean of class n's support features, `(B, Q, N)`.

    Args:
        support_BSE: Support features, class after class, equally many of each.
        query_BQE: Query features.
        way: N.
    """
    prototype_BNE = support_BSE.unflatten(1, (way, -1)).mean(dim=2)
    product_BQN = query_BQE @ prototype_BNE.transpose(1, 2)
    query_BQ1 = query_BQE.square().sum(dim=2, keepdim=True)
    return 2 * product_BQN - query_BQ1 - prototype_BNE.square().sum(dim=2).unsqueeze(1)


def prototype_accuracy(
    features: ImageData,
    classes: list[int],
    *,
    num_episodes: int,
    seed: int,
    way: int = _WAY,
    shot: int = 1,
    num_query: int = _NUM_QUERY,
) -> float:
    """Returns the share of query samples whose nearest prototype is that of their class, over several episodes.

    Args:
        features: Features, as `encode_images` returns them.
        classes: Classes to draw from.
        num_episodes: Number of episodes, from the sampler's first one on.
        seed: Seed of the sampler.
        way: Classes of an episode.
        shot: Support samples of each.
        num_query: Query samples of each.

    Raises:
        TaskError: Classes or samples do not suffice.
    """
    sampler = EpisodeSampler(features, classes, way=way, shot=shot, num_query=num_query, seed=seed)
    right = 0
    for first in range(0, num_episodes, _EPISODES_OF_A_BATCH):
        batch = sampler.batch(first, min(_EPISODES_OF_A_BATCH, num_episodes - first))
        logits_BQN = prototype_logits(batch.support_x.flatten(2), batch.query_x.flatten(2), way)
        right += int((logits_BQN.argmax(dim=2) == batch.query_y).sum())
    return right / (num_episodes * way * num_query)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Best:
    """The encoder of the best validation so far."""

    accuracy: float
    episode: int
    state: dict[str, Tensor]


class _Training:
    """One run of training; its random parts depend on the config's seed alone."""

    def __init__(self, config: EncoderConfig, data: ImageData) -> None:
        self._config, self._data = config, data
        mean, std = channel_statistics(data.x_SCHW)
        self.statistics = mean, tuple(value or 1.0 for value in std)
        self._domain_statistics = [_statistics_in(data, name, self.statistics) for name in config.domains]
        self.classes = classes_of(data, "train", config.group, config.seed)
        self._sampler = EpisodeSampler(
            data,
            self.classes,
            way=config.way,
            shot=config.shot,
            num_query=config.num_query,
            seed=config.seed,
            rotations=config.rotations,
        )
        self._held_out = class_subset(data, classes_of(data, "validation", config.group, config.seed))
        num_classes = len(self._held_out.class_names)
        self._held_out_classes = turned_classes(range(num_classes), num_classes, rotations=config.rotations)
        # Refuses too few images before any training rather than after.
        EpisodeSampler(self._held_out, range(num_classes), way=1, shot=1, num_query=_NUM_QUERY, seed=config.seed)
        self.precision = resolved(config.precision)

    def run(self, on_progress: OnProgress | None) -> _Best:
        """Trains to the end and returns the best encoder."""
        config = self._config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            module = build_network(config.network()).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        optimizer = torch.optim.Adam(module.parameters(), lr=config.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.num_episodes)
        best, validation = None, ""
        for episode in range(1, config.num_episodes + 1):
            loss = self._step(module, optimizer, self._draw(episode - 1))
            schedule.step()
            if episode % config.validate_every == 0 or episode == config.num_episodes:
                accuracy = self._validate(module)
                validation = f", validation accuracy {100 * accuracy:.1f}"
                if best is None or accuracy > best.accuracy:
                    best = _Best(accuracy=accuracy, episode=episode, state=copy.deepcopy(module.state_dict()))
            if on_progress is not None:
                on_progress(episode, config.num_episodes, f"episode {episode}, loss {loss:.3f}{validation}")
        assert best is not None, "the last episode is validated"
        return best

    def feature_statistics(self, best: _Best) -> tuple[tuple[float, ...], float]:
        """Returns the mean of each feature over the training classes' images, and the root mean square about it."""
        module = build_network(self._config.network())
        module.load_state_dict(best.state)
        frozen = FrozenEncoder(module, name="in training", identity="")
        data = class_subset(self._data, self.classes)
        blocks = encode(data, frozen, rotations=False, statistics=self.statistics)
        features_SE = torch.cat([torch.from_numpy(block) for block in blocks])
        centre_E = features_SE.mean(dim=0)
        spread = (features_SE - centre_E).square().mean().sqrt().clamp(min=1e-6)
        return tuple(centre_E.tolist()), float(spread)

    def _step(self, module: nn.Module, optimizer: torch.optim.Optimizer, x_TCHW: Tensor) -> float:
        config = self._config
        with autocast(self.precision):
            features_1TE = module(x_TCHW).unsqueeze(0)
        num_support = config.way * config.shot
        support_1SE, query_1QE = features_1TE.float().tensor_split([num_support], dim=1)
        logits_QN = prototype_logits(support_1SE, query_1QE, config.way)[0]
        loss = nn.functional.cross_entropy(logits_QN, torch.arange(config.way).repeat_interleave(config.num_query))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        value = float(loss.detach())
        if not value < float("inf"):
            raise EncoderError(f"training diverged: a loss of {value}; lower learning_rate={config.learning_rate}")
        return value

    def _draw(self, index: int) -> Tensor:
        """Returns the support images of an episode, then its query images."""
        config = self._config
        episode = self._sampler.episode(index)
        x_TCHW = self._in_domains(torch.cat([episode.support_x, episode.query_x]), index)
        if config.shift:
            background_TC11 = background(x_TCHW)
            shifted_TCHW = augment(x_TCHW - background_TC11, f"shift-{config.shift}", config.seed, index)
            x_TCHW = shifted_TCHW + background_TC11
        return x_TCHW.contiguous(memory_format=torch.channels_last)

    def _in_domains(self, x_TCHW: Tensor, index: int) -> Tensor:
        """Standardises pixels of an episode, each image as it looks in a domain that is drawn for it."""
        names = self._config.domains
        generator = torch.Generator().manual_seed(_DOMAIN_STREAM + self._config.seed * _STEP_STRIDE + index)
        drawn_T = torch.randint(len(names), (len(x_TCHW),), generator=generator)
        seen_TCHW = torch.empty(x_TCHW.shape)
        for number, (mean, std) in enumerate(self._domain_statistics):
            rows_S = (drawn_T == number).nonzero().squeeze(1)
            if len(rows_S):
                seen_TCHW[rows_S] = normalise(in_domain(x_TCHW[rows_S], names[number]), mean=mean, std=std)
        return seen_TCHW

    def _validate(self, module: nn.Module) -> float:
        config, data = self._config, self._held_out
        frozen = FrozenEncoder(copy.deepcopy(module), name="in training", identity="")
        blocks = encode(data, frozen, rotations=config.rotations, statistics=self.statistics)
        features_SE = torch.cat([torch.from_numpy(block) for block in blocks])
        features = feature_data(data, features_SE, rotations=config.rotations)
        return prototype_accuracy(
            features,
            self._held_out_classes,
            num_episodes=config.validation_episodes,
            seed=config.seed,
            way=min(_WAY, len(self._held_out_classes)),
        )


def _statistics_in(data: ImageData, domain: str, plain: Statistics) -> Statistics:
    """Returns mean and deviation of each channel in a domain."""
    if domain == _PLAIN[0]:
        return plain
    mean, std = channel_statistics(in_domain(data.x_SCHW, domain))
    return mean, tuple(value or 1.0 for value in std)


def _finished(config: EncoderConfig) -> EncoderCard | None:
    try:
        card = read_card(config.out)
    except TaskError:
        return None
    return card if card.facts.get("recipe") == config.recipe() else None
