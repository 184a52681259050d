"""Writes an adapter of a text encoder for a user's own labelled sentences."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from raywgen.files import write_text
from raywgen.generation.adapt_config import AdaptConfig, Adapted
from raywgen.generation.best import candidate_logits, generate_best
from raywgen.generation.conditions import make_condition
from raywgen.generation.fill import TrainedGenerator
from raywgen.generation.judge import remedies, warn_of_chance
from raywgen.generators import Generator
from raywgen.tasks import build_network
from raywgen.tasks.networks.text_adapter import HEAD, text_adapter
from raywgen.tasks.ridge_head import fit_ridge_head
from raywgen.tasks.sentence_form import SentenceForm
from raywgen.tasks.sentence_tasks import question
from raywgen.tasks.standing import Standing, standing
from raywgen.tasks.text_datasets import TextData, load_texts
from raywgen.tasks.user_data import ConditionError
from raywgen.trust import reading
from raywgen.weights import Condition, save_state_dict
from raywgen.weights.adapters import write_adapter

FACTS = "adapted.json"
_MILLISECONDS = 1e3


def adapt_text(config: AdaptConfig, trained: TrainedGenerator, form: SentenceForm) -> Adapted:
    """Writes a folder with an adapter as the PEFT library loads it, its head, and what is known of it.

    Raises:
        TaskError: Sentences or the text encoder cannot be read, or the encoder has changed.
        ConditionError: There are not at least two classes with two sentences each, or more than the generator knows.
        WeightsError: The folder cannot be written.

    Warns:
        ChanceWarning: The network answers the examples, each left out in turn, no better than chance.
    """
    generator = trained.generator
    data = load_texts(config.support)
    labels_S, num_classes = data.labels, _num_classes(data, config.support)
    test = _test_sentences(config.test, num_classes)
    instruction = config.instruction or question([[name] for name in data.class_names])
    with reading(config.generator):
        begin = time.perf_counter()
        samples_SF = form.samples(data.sentences)
    encoded = time.perf_counter()
    condition = make_condition(generator, instruction, (samples_SF, labels_S), config.policy)
    if config.reads != "both":
        condition = of_one_part(generator, condition, config.reads)
    (layout,) = generator.layouts
    with reading(config.generator):
        module = build_network(form.network).eval()
    drawn: dict[str, Any] = {"temperature": config.temperature, "seed": config.seed}
    generate_best(generator, condition, layout, module, best_of=config.best_of, **drawn)  # It pays for set-up.
    started = time.perf_counter()
    best = generate_best(generator, condition, layout, module, best_of=config.best_of, **drawn)
    taken = time.perf_counter() - started
    num = generator.data.num_features
    alone = fit_ridge_head(samples_SF[None, :, :num], labels_S[None], num_classes)
    own = standing(best.logits_BSC[0], labels_S, config.best_of)
    judged = {"on_examples": own, "head_alone": standing(alone.left_out_BSC[0], labels_S)}
    if test is not None:
        test_1SF = form.samples(test.sentences).unsqueeze(0)
        logits_SC = candidate_logits(module, layout, best.values_BD, test_1SF)[0]
        judged["on_test"] = standing(logits_SC, test.labels)
        judged["head_alone_on_test"] = standing(alone(test_1SF[..., :num])[0], test.labels)
    adapter, head = text_adapter(form.network, layout.unflatten(best.values_BD[0]))
    folder = write_adapter(adapter, config.out)
    if head:
        save_state_dict(head, folder / HEAD, {"format": "pt"})
    _write_facts(folder, config, data, instruction, judged)
    warn_of_chance(config.out, own, remedies(generator, config.best_of, is_known=True, adapted=True))
    return Adapted(
        path=config.out,
        num_values=layout.num_values,
        classes=data.class_names,
        num_examples=len(labels_S),
        encode_ms=_MILLISECONDS * (encoded - begin),
        generate_ms=_MILLISECONDS * taken,
        heads=(),
        on_examples=own,
        head_alone=judged["head_alone"],
        on_test=judged.get("on_test"),
        head_alone_on_test=judged.get("head_alone_on_test"),
    )


def of_one_part(generator: Generator, condition: Condition, reads: str) -> Condition:
    """Returns the condition from which a generator reads the instruction alone, or the examples alone."""
    if not generator.reads_parts:
        raise ConditionError(
            f"reads={reads}: this generator was always trained with both; train it with condition_dropout above 0 "
            "(hypernetwork, IGPG), or leave reads out"
        )
    return condition.reading(instruction=reads == "instruction", samples=reads == "examples")


def _num_classes(data: TextData, path: str) -> int:
    """Counts the classes of the examples, which must be numbered from 0 without a gap."""
    present, counts = data.labels.unique(return_counts=True)
    if present.tolist() != list(range(len(present))):
        raise ConditionError(f"{path}: labels are {present.tolist()}; number the classes from 0 without a gap")
    if len(present) < 2 or int(counts.min()) < 2:
        raise ConditionError(
            f"{path}: its classes have {counts.tolist()} sentences; give two classes or more with two sentences each, "
            "so that one can be left out"
        )
    return len(present)


def _test_sentences(path: str, num_classes: int) -> TextData | None:
    """Reads the sentences of `test`, if any, whose classes must be those of the examples."""
    if not path:
        return None
    test = load_texts(path)
    if (largest := int(test.labels.max())) >= num_classes:
        raise ConditionError(f"{path}: label {largest} is no class of the examples, which have 0 to {num_classes - 1}")
    return test


def _write_facts(
    folder: Path, config: AdaptConfig, data: TextData, instruction: str, judged: Mapping[str, Standing]
) -> None:
    facts: dict[str, Any] = {
        "generator": config.generator,
        "instruction": instruction,
        "classes": list(data.class_names),
        "num_examples": len(data.labels),
        "policy": config.policy,
    }
    facts |= {name: asdict(one) | {"verdict": one.verdict} for name, one in judged.items()}
    write_text(folder / FACTS, json.dumps(facts, indent=1))
