"""Generates weights for a new task from its labelled examples."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from raywgen.files import write_text
from raywgen.generation.adapt_config import AdaptConfig, Adapted
from raywgen.generation.adapt_next_word import adapt_next_word
from raywgen.generation.adapt_text import adapt_text
from raywgen.generation.classifier import Classifier
from raywgen.generation.conditions import make_condition
from raywgen.generation.fill import ADAPT_INSTRUCTION, TrainedGenerator
from raywgen.generation.heads import Drawn, check_classes, choose_classifier, writes_heads
from raywgen.generation.judge import remedies, warn_of_chance
from raywgen.generation.loading import load
from raywgen.generation.modules import UnknownLayoutError, adapt_weights
from raywgen.nn.devices import say_device
from raywgen.out_folder import local_file, local_out, local_path
from raywgen.tasks.user_data import ConditionError, UserData, read_data
from raywgen.trust import entry_point
from raywgen.weights import Layout, save_state_dict

_MILLISECONDS = 1e3
T = TypeVar("T")


@entry_point
def adapt(config: AdaptConfig) -> Adapted:
    """Generates a `state_dict` for a new task and writes it to a file.

    A generator of heads takes any number of classes, a generator of whole networks those of its architecture. Of heads
    the best of several is kept, only one of which the generator writes; see `AdaptConfig.head`.

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
    data = read_support(config.support, trained)
    if writes_heads(trained.generator):
        return _adapt_head(config, trained, data)
    if config.head != "best":
        raise ConditionError(f"head={config.head}: this generator writes whole networks, not heads; leave it out")
    layout = support_layout(trained)

    def generate() -> Tensor:
        condition = make_condition(
            trained.generator, ADAPT_INSTRUCTION, (trained.features(data.x), data.labels), config.policy
        )
        return adapt_weights(trained.generator, layout, condition, config.temperature, config.seed)

    values_D, _, seconds = _timed(trained, data, generate)
    save_state_dict(layout.unflatten(values_D), config.out, {"method": trained.generator.method})
    write_text(Path(config.out).with_suffix(".json"), json.dumps(_facts(config, trained, data), indent=1))
    return Adapted(
        path=config.out,
        num_values=layout.num_values,
        classes=data.class_names,
        num_examples=len(data.labels),
        encode_ms=0.0,
        generate_ms=_MILLISECONDS * seconds,
        on_examples=None,
        heads=(),
    )


def _adapt_head(config: AdaptConfig, trained: TrainedGenerator, data: UserData) -> Adapted:
    """Writes a head."""
    drawn = Drawn(instruction=ADAPT_INSTRUCTION, policy=config.policy, temperature=config.temperature, seed=config.seed)

    def choose() -> Classifier:
        return choose_classifier(trained.generator, trained.encoder, trained.inputs, data, config.head, drawn)

    made, encode_seconds, seconds = _timed(trained, data, choose)
    on_examples = made.heads[made.kept].left_out
    heads = {
        name: None if one.left_out is None else asdict(one.left_out) | {"compared_loss": one.loss}
        for name, one in made.heads.items()
    }
    made.save(config.out, _facts(config, trained, data) | {"kept": made.kept, "heads": heads})
    if on_examples is not None:
        warn_of_chance(config.out, on_examples, remedies(trained.generator, None, is_known=True, adapted=True))
    return Adapted(
        path=config.out,
        num_values=sum(parameter.numel() for parameter in made.head.parameters()),
        classes=data.class_names,
        num_examples=len(data.labels),
        encode_ms=_MILLISECONDS * encode_seconds,
        generate_ms=_MILLISECONDS * (seconds - encode_seconds),
        on_examples=on_examples,
        heads=tuple(made.lines()),
    )


def _timed(trained: TrainedGenerator, data: UserData, call: Callable[[], T]) -> tuple[T, float, float]:
    """Returns a result, the seconds that the encoder takes for the examples, and those of the whole call."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # Products this small are faster on one, above all on a busy machine.
    try:
        call()  # The first call pays for set-up, which a process that serves many tasks pays once.
        begin = time.perf_counter()
        trained.features(data.x)
        encoded = time.perf_counter()
        found = call()
        return found, encoded - begin if trained.encoder is not None else 0.0, time.perf_counter() - encoded
    finally:
        torch.set_num_threads(threads)


def _facts(config: AdaptConfig, trained: TrainedGenerator, data: UserData) -> dict[str, Any]:
    return {
        "method": trained.generator.method,
        "generator": config.generator,
        "classes": list(data.class_names),
        "num_examples": len(data.labels),
        "policy": config.policy,
    }


def read_support(path: str, trained: TrainedGenerator) -> UserData:
    """Reads labelled examples, whose classes are numbered from 0.

    Raises:
        TaskError, ConditionError: They cannot be read, or a class has no example.
    """
    data = read_data(path, trained.inputs)
    try:
        check_classes(data.labels)
    except ConditionError as error:
        raise ConditionError(f"{path}: {error}") from error
    return data


def support_layout(trained: TrainedGenerator) -> Layout:
    """Returns the one architecture that the generator knows.

    Raises:
        UnknownLayoutError: It knows several.
    """
    layouts = [layout for layout, _ in trained.generator.normalizers.values()]
    if len(layouts) > 1:
        raise UnknownLayoutError(
            f"the generator knows {len(layouts)} architectures; fill the module that you want by "
            "raywgen.load(...).adapt(module, support)"
        )
    return layouts[0]
