"""Draws the tasks that a zoo's networks are trained for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raywgen.locations import absolute
from raywgen.tasks import TaskError, draw_subset_tasks
from raywgen.tasks.domain_texts import draw_domain_classes, draw_domain_words
from raywgen.tasks.encoders import encoder_kind
from raywgen.tasks.image_tasks import DIGITS, num_classes
from raywgen.tasks.networks.text_models import PACKAGED, causal_digest, encoder_digest
from raywgen.tasks.sentence_words import draw_sentence_words
from raywgen.tasks.subsets import Groups, draw_groups, draw_subsets
from raywgen.tasks.text_sets import set_classes
from raywgen.trust import HUB
from raywgen.zoo.config import ZooConfig

Recipes = dict[str, list[dict[str, Any]]]


def draw_tasks(config: ZooConfig) -> Recipes:
    """Draws the recipes of tasks by split: `seen`, `validation`, `unseen`.

    Raises:
        TaskError: The config wants more tasks than there are.
    """
    recipes = _DRAW[config.tasks.kind](config)
    if not config.tasks.encoder:
        return recipes
    encoder = _absolute_encoder(config.tasks.encoder)
    return {split: [_encoded(encoder, recipe) for recipe in drawn] for split, drawn in recipes.items()}


def network_recipes(config: ZooConfig) -> list[dict[str, Any]]:
    """Returns recipes of the networks in which paths are absolute, so that they are valid on any node."""
    return [_absolute_network(recipe, config) for recipe in config.network_recipes()]


def _digits_subsets(config: ZooConfig) -> Recipes:
    return draw_subset_tasks(
        num_seen=config.num_seen_tasks,
        num_validation=config.num_validation_tasks,
        num_unseen=config.num_unseen_tasks,
        seed=config.seed,
    )


def _images(config: ZooConfig) -> Recipes:
    return {"seen": [_image_recipe(config)], "validation": [], "unseen": []}


def _class_subsets(config: ZooConfig) -> Recipes:
    counts = {
        "unseen": config.num_unseen_tasks,
        "validation": config.num_validation_tasks,
        "seen": config.num_seen_tasks,
    }
    subsets = draw_subsets(num_classes(config.tasks.path), config.tasks.subset_size, sum(counts.values()), config.seed)
    recipes: Recipes = {}
    for split, count in counts.items():
        chosen, subsets = subsets[:count], subsets[count:]
        recipes[split] = [_image_recipe(config) | {"classes": list(classes)} for classes in chosen]
    return {split: recipes[split] for split in ("seen", "validation", "unseen")}


def _episodes(config: ZooConfig) -> Recipes:
    names = ("way", "shot", "num_query", "group", "rotations", "path", "size", "channels")
    shared = {"name": "episode", "seed": config.seed} | {name: getattr(config.tasks, name) for name in names}
    shared["path"] = _absolute(config.tasks.path)
    known, new = _split_domains(config) if config.tasks.domains else ([("", "plain")], [("", "plain")])
    # Other data has no validation classes of its own.
    own = [(path, domain) for path, domain in known if not path] or [("", "plain")]
    drawn: Recipes = {}
    for split, classes, count, domains in (
        ("seen", "train", config.num_seen_tasks, known),
        ("validation", "validation", config.num_validation_tasks, own),
        ("unseen", "test", config.num_unseen_tasks, new),
    ):
        drawn[split] = []
        for index in range(count):
            path, domain = domains[index % len(domains)]
            # Other data is not split: all its classes are used.
            other = {"path": path, "group": "", "split": "all"} if path else {}
            drawn[split].append(shared | {"split": classes, "index": index, "domain": domain} | other)
    return drawn


def _domains(config: ZooConfig) -> Recipes:
    known, new = _split_domains(config)

    def recipe(path: str, domain: str) -> dict[str, Any]:
        other = {"path": path, "test_path": ""} if path else {}
        return _image_recipe(config) | {"domain": domain} | other

    return {"seen": [recipe(*one) for one in known], "validation": [], "unseen": [recipe(*one) for one in new]}


def _split_domains(config: ZooConfig) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Returns path and domain of each known and of each new domain; `PATH::DOMAIN` is a domain of other data."""
    if len(set(config.tasks.domains)) < len(config.tasks.domains):
        raise TaskError(f"tasks.domains={config.tasks.domains}: a domain is named twice; name each once")
    parts = (name.rpartition("::") for name in config.tasks.domains)
    domains = [(_absolute(path), domain) for path, _, domain in parts]
    num_known = len(domains) - config.tasks.num_unseen_domains
    return domains[:num_known], domains[num_known:]


def _image_recipe(config: ZooConfig) -> dict[str, Any]:
    names = ("path", "test_path", "size", "channels", "limit", "test_limit")
    recipe = {"name": "images"} | {name: getattr(config.tasks, name) for name in names}
    return recipe | {name: _absolute(recipe[name]) for name in ("path", "test_path")}


def _texts(config: ZooConfig) -> Recipes:
    recipe = {"name": "texts", "path": _absolute(config.tasks.path), "num_features": config.tasks.num_features}
    return {"seen": [recipe], "validation": [], "unseen": []}


def _sentence_groups(config: ZooConfig) -> Recipes:
    tasks = config.tasks
    paths = tasks.paths or [tasks.path]
    of_paths = set_classes(paths)
    classes = tasks.classes or [number for own in of_paths for number in own]
    num_known = config.num_validation_tasks + config.num_seen_tasks
    if tasks.num_unseen_paths:
        new = {number for own in of_paths[-tasks.num_unseen_paths :] for number in own}
        unseen = draw_groups([number for number in classes if number in new], config.num_unseen_tasks, config.seed)
        known = draw_groups([number for number in classes if number not in new], num_known, config.seed)
        return _sentence_recipes(config, [*unseen, *known])
    if missing := sorted(set(tasks.heldout_classes) - set(classes)):
        raise TaskError(f"tasks.heldout_classes={tasks.heldout_classes}: {missing[0]} is none of the classes {classes}")
    known = [number for number in classes if number not in tasks.heldout_classes]
    num_unseen = config.num_unseen_tasks
    if tasks.heldout_classes:
        unseen = draw_groups(classes, num_unseen, config.seed, containing=tasks.heldout_classes)
        drawn = unseen + draw_groups(known, num_known, config.seed)
    else:
        drawn = draw_groups(classes, num_unseen + num_known, config.seed)
    return _sentence_recipes(config, drawn)


def _sentence_words(config: ZooConfig) -> Recipes:
    counts = config.num_unseen_tasks, config.num_validation_tasks, config.num_seen_tasks
    drawn = draw_sentence_words(config.tasks.paths or [config.tasks.path], counts, config.seed)
    shared = _sentence_recipe(config, "sentence-words")
    unseen, validation, seen = ([shared | arguments for arguments in part] for part in drawn)
    return {"seen": seen, "validation": validation, "unseen": unseen}


def _domain_texts(config: ZooConfig) -> Recipes:
    counts = config.num_unseen_tasks, config.num_validation_tasks, config.num_seen_tasks
    chosen = config.tasks.paths or [config.tasks.path], counts, config.seed, config.tasks.num_unseen_paths
    if config.tasks.kind == "domain-words":
        drawn = draw_domain_words(*chosen, num_texts=config.tasks.limit)
    else:
        drawn = draw_domain_classes(*chosen)
    shared = _sentence_recipe(config, "domain-texts") | {"class_names": config.tasks.class_names}
    unseen, validation, seen = ([shared | arguments for arguments in part] for part in drawn)
    return {"seen": seen, "validation": validation, "unseen": unseen}


def _sentence_recipes(config: ZooConfig, drawn: Sequence[Groups]) -> Recipes:
    """Returns the recipes of unseen, validation and seen groups, which are drawn in this order."""
    shared = _sentence_recipe(config, "sentence-groups") | {"class_names": config.tasks.class_names}
    recipes = [shared | {"groups": [list(group) for group in groups]} for groups in drawn]
    num_unseen = config.num_unseen_tasks
    first_seen = num_unseen + config.num_validation_tasks
    return {
        "seen": recipes[first_seen:],
        "validation": recipes[num_unseen:first_seen],
        "unseen": recipes[:num_unseen],
    }


def _sentence_recipe(config: ZooConfig, name: str) -> dict[str, Any]:
    """Returns what all tasks on sentences have in common."""
    tasks = config.tasks
    paths = [_absolute(path) for path in tasks.paths]
    pinned = _pinned(tasks.base, "base", is_causal=name == "domain-texts")
    shared = {"name": name, "path": paths or _absolute(tasks.path), **pinned}
    return shared | {key: getattr(tasks, key) for key in ("first_layer", "max_tokens", "limit", "test_limit")}


def _pinned(path: str, key: str, *, is_causal: bool = False) -> dict[str, str]:
    """Names a text model so that it is the same one wherever and whenever the recipe is read."""
    is_folder = path != PACKAGED and not path.startswith(HUB)
    return {
        key: absolute(path) if is_folder else path,
        "digest": (causal_digest if is_causal else encoder_digest)(path),
    }


def _absolute(path: str) -> str:
    """Makes a path absolute, so that it is valid for workers and later readers of the recipe."""
    return path if path in ("", DIGITS) else absolute(path)


def _absolute_encoder(encoder: str) -> str:
    return _absolute(encoder) if encoder_kind(encoder) == "folder" else encoder


def _encoded(encoder: str, recipe: dict[str, Any]) -> dict[str, Any]:
    if recipe["name"] == "episode":
        return recipe | {"name": "feature-episode", "encoder": encoder}
    return {"name": "encoded", "encoder": encoder, "task": recipe}


def _absolute_network(recipe: dict[str, Any], config: ZooConfig) -> dict[str, Any]:
    """Makes the paths in an adapter's recipe absolute, which name the weights that it adapts.

    A `next-word` base is that of the tasks.
    """
    if recipe["name"] != "lora":
        return recipe
    weights, base = recipe.get("weights"), recipe.get("base")
    absolutes: dict[str, Any] = {"weights": _absolute(weights)} if weights else {}
    if isinstance(base, Mapping) and base.get("name") == "upper-layers":
        absolutes["base"] = {**base, **_pinned(str(base.get("path", PACKAGED)), "path")}
    if isinstance(base, Mapping) and base.get("name") == "next-word":
        pinned = _pinned(config.tasks.base, "path", is_causal=True)
        absolutes["base"] = {**base, **pinned, "first_layer": config.tasks.first_layer}
    if isinstance(base, Mapping) and base.get("name") == "causal-lm" and not str(base["path"]).startswith(HUB):
        absolutes["base"] = {**base, "path": absolute(str(base["path"]))}
    return recipe | absolutes


_DRAW = {
    "digits-subsets": _digits_subsets,
    "images": _images,
    "class-subsets": _class_subsets,
    "episodes": _episodes,
    "domains": _domains,
    "texts": _texts,
    "sentence-groups": _sentence_groups,
    "sentence-words": _sentence_words,
    "domain-words": _domain_texts,
    "domain-classes": _domain_texts,
}
