"""Turns values of knobs into the configs of one trial, and checks the whole space before a search begins."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import optuna
from omegaconf import OmegaConf

from raywgen.config import ConfigError, load_config, merge_config, shipped_config
from raywgen.names import nearest
from raywgen.renamed_keys import new_name
from raywgen.training import TrainConfig, load_train_config
from raywgen.tuning.config import TuneConfig
from raywgen.tuning.space import Knob, Values, draw, flatten, parse_space
from raywgen.zoo import ZooConfig

PARTS = ("zoo", "train")
_NUM_DRAWS = 32
# The search itself sets a trial's folder and corpus, and all trials need the same resources of the cluster.
_SET_BY_SEARCH = {
    "zoo.out": "give `out` of the search itself",
    "train.out": "give `out` of the search itself",
    "train.corpus": "give `corpus` of the search itself",
    "train.method": "give the method or its config as `train` of the search itself, such as train=mcdi",
}
_ONLY_FIXED = ("train.num_workers", "train.device")
Tree = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialConfigs:
    """The configs of one trial; `zoo` is None where the corpus is given."""

    zoo: ZooConfig | None
    train: TrainConfig

    @property
    def corpus_name(self) -> str:
        """Name of the corpus' folder: a hash of its recipe."""
        assert self.zoo is not None
        recipe = json.dumps(self.zoo.recipe(), sort_keys=True, default=str)
        return hashlib.sha256(recipe.encode()).hexdigest()[:12]


class Pipeline:
    """The base configs of a search and its knobs.

    Args:
        config: The search.

    Raises:
        ConfigError: A base config, a knob or a fixed value is wrong.
    """

    def __init__(self, config: TuneConfig) -> None:
        config.check_source()
        self.knobs = parse_space(config.space)
        self._trees: dict[str, Tree] = {"train": _tree(load_train_config(config.train))}
        if config.zoo:
            self._trees["zoo"] = _tree(load_config(ZooConfig, shipped_config("zoo", config.zoo)))
        for key, value in flatten(config.fixed, lambda value: not isinstance(value, dict)).items():
            if key in _SET_BY_SEARCH:
                raise ConfigError(f"fixed: {key} is chosen by the search; {_SET_BY_SEARCH[key]}")
            _assign(self._trees, key, value, "fixed")
        zoo = merge_config(ZooConfig, [("zoo", self._trees["zoo"])]) if config.zoo else None
        train = merge_config(TrainConfig, [("train", self._trees["train"])])
        self.base = TrialConfigs(
            zoo=zoo, train=dataclasses.replace(train, corpus=config.corpus) if config.corpus else train
        )
        # Entries of lists get their defaults here, so that a knob can name any of their keys.
        self._trees = {part: _tree(base) for part, base in (("zoo", zoo), ("train", self.base.train)) if base}

    def configs(self, values: Values) -> TrialConfigs:
        """Returns the configs of a trial with these values.

        Raises:
            ConfigError: The values contradict each other.
        """
        trees = copy.deepcopy(self._trees)
        for key, value in values.items():
            _assign(trees, key, value, "space")
        # A whole config takes a tenth of a second to build, so only what a knob touches is merged over the base.
        changed: dict[str, Tree] = {part: {} for part in PARTS}
        for key in values:
            part, name, *_ = key.split(".")
            changed[part][name] = trees[part][name]
        zoo = self.base.zoo
        if zoo is not None and changed["zoo"]:
            zoo = merge_config(ZooConfig, [("zoo", changed["zoo"])], zoo)
        return TrialConfigs(zoo=zoo, train=merge_config(TrainConfig, [("train", changed["train"])], self.base.train))

    @property
    def turns_zoo(self) -> bool:
        """Whether the corpora of trials differ."""
        return any(knob.key.startswith("zoo.") for knob in self.knobs)

    def check(self) -> None:
        """Tries the extreme values of every knob, then random draws of all knobs together.

        Raises:
            ConfigError: The space allows values that no config accepts.
        """
        if self.base.train.device == "cuda" and self.base.train.max_workers == 0:
            raise ConfigError(
                "train.device=cuda: a trial with train.num_workers=0 has no GPU of its own; give "
                "train.num_workers=1, or leave train.device out, in `fixed`"
            )
        for knob in self.knobs:
            if knob.key in _SET_BY_SEARCH:
                raise ConfigError(f"space: {knob.key} is no knob; {_SET_BY_SEARCH[knob.key]}")
            if knob.key in _ONLY_FIXED:
                raise ConfigError(f"space: {knob.key} is no knob; every trial has the same, set it in `fixed`")
        for key, values in self.corners():
            self._try(values, f"{key}={values[key]}")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        for _ in range(_NUM_DRAWS):
            drawn = draw(self.knobs, study.ask())
            self._try(drawn, ", ".join(f"{key}={value}" for key, value in drawn.items()))

    def corners(self) -> Iterator[tuple[str, Values]]:
        """Yields each extreme value of each knob: its key, and the values of a trial that has it."""
        for knob in self.knobs:
            for value in knob.corners():
                yield knob.key, {**self._beside(knob), knob.key: value}

    def _beside(self, knob: Knob) -> Values:
        """Returns values of other knobs for which this one exists; all others keep the base's value."""
        known = {other.key: other for other in self.knobs}
        needed: Values = {}
        for key, values in knob.when.items():
            needed |= self._beside(known[key]) | {key: values[0]}
        return needed

    def _try(self, values: Values, description: str) -> None:
        try:
            self.configs(values)
        except ConfigError as error:
            raise ConfigError(f"the space allows {description}, which cannot be: {error}") from error


def _tree(config: Any) -> Tree:
    tree = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def _has(tree: Any, key: str) -> bool:
    for name in key.split("."):
        if not isinstance(tree, dict) or name not in tree:
            return False
        tree = tree[name]
    return True


def _assign(trees: dict[str, Tree], key: str, value: Any, source: str) -> None:
    """Sets the value of a dotted key, which must exist."""
    part, *names = key.split(".")
    if part not in trees or not names:
        if part == "zoo":
            raise ConfigError(f"{source}: {key} is a key of a recipe, but a corpus is given; give zoo in its place")
        near = nearest(part, PARTS)
        raise ConfigError(f"unknown key '{key}' in {source}; keys begin with zoo. or train., did you mean '{near}.'?")
    place: Any = trees[part]
    for depth, name in enumerate(names):
        known = [str(index) for index in range(len(place))] if isinstance(place, list) else list(map(str, place))
        if name not in known:
            before = ".".join([part, *names[:depth], ""])
            hint = "it is empty"
            longer = [".".join([part, *names[:end]]) for end in range(len(names), depth, -1)]
            if renamed := new_name(longer, lambda name: _has(trees, name)):
                hint = f"it is called '{renamed[1]}' now"
            elif known:
                hint = f"did you mean '{before}{nearest(name, known)}'? (known here: {', '.join(sorted(known))})"
            if before == "train.generator.":
                hint += f"; a search of {trees['train']['method']} takes the settings of that method alone"
            raise ConfigError(f"unknown key '{key}' in {source}; {hint}")
        index: Any = int(name) if isinstance(place, list) else name
        if depth + 1 == len(names):
            place[index] = value
        elif not isinstance(place[index], dict | list):
            raise ConfigError(f"unknown key '{key}' in {source}; {'.'.join([part, *names[: depth + 1]])} is a value")
        else:
            place = place[index]
