"""Generates weights for a new task from its labelled examples."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raywgen.files import write_text
from raywgen.generation.adapt_config import AdaptConfig, Adapted
from raywgen.generation.adapt_next_word import adapt_next_word
from raywgen.generation.adapt_text import adapt_text
from raywgen.generation.conditions import make_condition
from raywgen.generation.fill import ADAPT_INSTRUCTION, TrainedGenerator
from raywgen.generation.judge import judge, remedies, warn_of_chance
from raywgen.generation.loading import load
from raywgen.generation.modules import UnknownLayoutError, adapt_weights
from raywgen.generators.common.denoisers import is_head
from raywgen.nn.devices import say_device
from raywgen.out_folder import local_file, local_out, local_path
from raywgen.tasks import build_network
from raywgen.tasks.user_data import ConditionError, read_data
from raywgen.trust import entry_point
from raywgen.weights import Layout, save_state_dict

_MILLISECONDS = 1e3


@entry_point
def adapt(config: AdaptConfig) -> Adapted:
    """Generates a `state_dict` for a new task and writes it to a file.

    A generator of heads takes any number of classes, a generator of whole networks those of its architecture.

    Raises:
        BundleError, EncoderError: The generator cannot be read.
        DeviceError: A GPU is asked for, and there is none.
        TaskError, ConditionError: The examples cannot be read, or do not fit.
        UnknownLayoutError: The generator knows several architectures.
        OutError: `out` is empty or a URI.
        WeightsError: The file cannot be written.

    Warns:
        ChanceWarning: The network answers the examples no better than chance.
    """
    local_path(config.out, AdaptConfig.out, "raywgen adapt")
    trained = load(config.generator, device=config.device)
    say_device(f"{config.out}: generates", config.device, trained.generator.device)
    if trained.sentences is not None:
        local_out(config.out, "adapter", "raywgen adapt")
        write = adapt_next_word if trained.sentences.is_causal else adapt_text
        return write(config, trained, trained.sentences)
    if config.instruction or config.test or config.best_of > 1 or config.reads != "both":
        raise ConditionError(
            "instruction, test, reads and best_of are of adapters of a text model; this generator adapts by examples "
            "alone, so leave them out"
        )
    local_file(config.out, AdaptConfig.out, "raywgen adapt")
    samples, labels_S, classes = read_support(config.support, trained)
    layout = support_layout(trained, len(classes))
    recipe = _head_recipe(trained, len(classes))

    def generate() -> tuple[Tensor, float, float]:
        begin = time.perf_counter()
        features_SF = trained.features(samples)
        encoded = time.perf_counter()
        condition = make_condition(trained.generator, ADAPT_INSTRUCTION, (features_SF, labels_S), config.policy)
        values_D = adapt_weights(trained.generator, layout, condition, config.temperature, config.seed)
        return values_D, encoded - begin, time.perf_counter() - encoded

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # Products this small are faster on one, above all on a busy machine.
    try:
        generate()  # The first call pays for set-up, which a process that serves many tasks pays once.
        values_D, encode_seconds, generate_seconds = generate()
    finally:
        torch.set_num_threads(threads)
    on_examples = None
    if recipe is not None:
        module = build_network(recipe).eval()
        on_examples = judge(module, layout, values_D, trained.features(samples), labels_S)
    facts: dict[str, Any] = {
        "method": trained.generator.method,
        "generator": config.generator,
        "classes": list(classes),
        "num_examples": len(labels_S),
        "policy": config.policy,
        "on_examples": None if on_examples is None else asdict(on_examples) | {"verdict": on_examples.verdict},
    }
    save_state_dict(layout.unflatten(values_D), config.out, {"method": trained.generator.method})
    write_text(Path(config.out).with_suffix(".json"), json.dumps(facts, indent=1))
    if on_examples is not None:
        warn_of_chance(config.out, on_examples, remedies(trained.generator, None, is_known=True, adapted=True))
    return Adapted(
        path=config.out,
        num_values=layout.num_values,
        classes=classes,
        num_examples=len(labels_S),
        encode_ms=_MILLISECONDS * encode_seconds if trained.encoder is not None else 0.0,
        generate_ms=_MILLISECONDS * generate_seconds,
        on_examples=on_examples,
    )


def read_support(path: str, trained: TrainedGenerator) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Reads samples `(S, ...)`, labels int64 `(S,)` from 0, and the classes' names.

    Raises:
        TaskError, ConditionError: They cannot be read, or a class has no example.
    """
    data = read_data(path, trained.inputs)
    present = data.labels.unique().tolist()
    if present != list(range(len(present))):
        raise ConditionError(f"{path}: labels are {present}; number the classes from 0 without a gap")
    return data.x, data.labels, data.class_names


def support_layout(trained: TrainedGenerator, num_classes: int) -> Layout:
    """Returns the layout to fill: a head of that many classes, or the one architecture that the generator knows.

    Raises:
        UnknownLayoutError: The generator knows several.
    """
    generator = trained.generator
    if (recipe := _head_recipe(trained, num_classes)) is not None:
        return Layout.from_state_dict(build_network(recipe).state_dict())
    layouts = [layout for layout, _ in generator.normalizers.values()]
    if len(layouts) > 1:
        raise UnknownLayoutError(
            f"the generator knows {len(layouts)} architectures; fill the module that you want by "
            "raywgen.load(...).adapt(module, support)"
        )
    return layouts[0]


def _head_recipe(trained: TrainedGenerator, num_classes: int) -> dict[str, Any] | None:
    """Returns the recipe of a head of that many classes; None where the generator writes whole networks."""
    generator = trained.generator
    first, _ = next(iter(generator.normalizers.values()))
    if not is_head(first, generator.data.num_features):
        return None
    return {"name": "head", "num_features": generator.data.num_features, "num_classes": num_classes}
