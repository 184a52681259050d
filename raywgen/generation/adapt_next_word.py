"""Writes an adapter of a causal language model for a user's own texts."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from raywgen.files import write_text
from raywgen.generation.adapt_config import AdaptConfig, Adapted, NextWordLoss
from raywgen.generation.adapt_text import FACTS, of_one_part
from raywgen.generation.best import candidate_logits, generate_best
from raywgen.generation.conditions import make_condition
from raywgen.generation.fill import TrainedGenerator
from raywgen.tasks import balanced_cross_entropy, build_network
from raywgen.tasks.networks.text_adapter import text_adapter
from raywgen.tasks.sentence_form import SentenceForm
from raywgen.tasks.text_datasets import load_plain_texts
from raywgen.trust import reading
from raywgen.weights import Layout
from raywgen.weights.adapters import write_adapter

_MILLISECONDS = 1e3
_INSTRUCTION = "Continue texts like these."


def adapt_next_word(config: AdaptConfig, trained: TrainedGenerator, form: SentenceForm) -> Adapted:
    """Writes a folder with an adapter as the PEFT library loads it, and what is known of it.

    Raises:
        TaskError: Texts or the language model cannot be read, a text is empty, or the model has changed.
        ConditionError: The generator was always trained with instruction and texts, and one alone is asked for.
        WeightsError: The folder cannot be written.
    """
    generator = trained.generator
    texts = load_plain_texts(config.support)
    test = load_plain_texts(config.test) if config.test else ()
    instruction = config.instruction or _INSTRUCTION
    with reading(config.generator):
        begin = time.perf_counter()
        samples_SF = form.samples(texts)
        encoded = time.perf_counter()
        test_SF = form.samples(test) if test else None
        module = build_network(form.network).eval()
    condition = make_condition(generator, instruction, (samples_SF, _zeros(samples_SF)), config.policy)
    if config.reads != "both":
        condition = of_one_part(generator, condition, config.reads)
    (layout,) = generator.layouts
    drawn: dict[str, Any] = {"best_of": config.best_of, "temperature": config.temperature, "seed": config.seed}
    generate_best(generator, condition, layout, module, **drawn)  # It pays for set-up.
    started = time.perf_counter()
    values_1D = generate_best(generator, condition, layout, module, **drawn).values_BD
    taken = time.perf_counter() - started
    own = _losses(module, layout, values_1D, samples_SF)
    on_test = None if test_SF is None else _losses(module, layout, values_1D, test_SF)
    adapter, _ = text_adapter(form.network, layout.unflatten(values_1D[0]))
    folder = write_adapter(adapter, config.out)
    facts: dict[str, Any] = {"generator": config.generator, "instruction": instruction, "num_examples": len(texts)}
    facts |= {"policy": config.policy, "next_word": asdict(own)}
    facts |= {} if on_test is None else {"next_word_on_test": asdict(on_test)}
    write_text(folder / FACTS, json.dumps(facts, indent=1))
    return Adapted(
        path=config.out,
        num_values=layout.num_values,
        classes=(),
        num_examples=len(texts),
        encode_ms=_MILLISECONDS * (encoded - begin),
        generate_ms=_MILLISECONDS * taken,
        on_examples=None,
        heads=(),
        next_word=own,
        next_word_on_test=on_test,
    )


@torch.no_grad()
def _losses(module: nn.Module, layout: Layout, values_1D: Tensor, x_SF: Tensor) -> NextWordLoss:
    # B of a new adapter is zero, so that it changes nothing.
    plain_1D = layout.flatten(module.state_dict()).unsqueeze(0)
    outputs = (candidate_logits(module, layout, one_1D, x_SF.unsqueeze(0)) for one_1D in (values_1D, plain_1D))
    written, plain = (float(balanced_cross_entropy(logits_1SC, _zeros(x_SF))) for logits_1SC in outputs)
    return NextWordLoss(adapted=written, base=plain)


def _zeros(samples_SF: Tensor) -> Tensor:
    """Returns the labels of texts, which are all of one class."""
    return torch.zeros(len(samples_SF), dtype=torch.int64)
