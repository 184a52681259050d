"""Times the rows of a benchmark on left-out data: milliseconds of the processor from support images to a classifier.

The classification of queries is left out, except that of a single one, by which rows without a head of their own are
made to work.

Shape letters beyond the legend in `raywgen.weights`: S support samples.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from raywgen.benchmarks.adapted_rows import Adaptation
from raywgen.benchmarks.chosen_heads import chosen_classifier
from raywgen.benchmarks.encoder_worth import ROWS, EncoderRows
from raywgen.benchmarks.few_shot import generated_heads
from raywgen.benchmarks.few_shot_config import FewShotConfig
from raywgen.benchmarks.few_shot_parts import Parts
from raywgen.benchmarks.trained import HEADLINES
from raywgen.evaluation.few_shot import Learner, fit_head_autograd, prototypes, time_alternating

_REPETITIONS = 10


def row_times(
    config: FewShotConfig, parts: Parts, rows: EncoderRows, adapted: Mapping[str, Adaptation], chosen: Mapping[str, Any]
) -> dict[str, float]:
    """Returns `ms_ROW`: the median over some calls of each row for the first test episode, on one thread.

    Args:
        config: Settings.
        parts: What is compared.
        rows: Rows of encoders.
        adapted: Rows that adapt, by name.
        chosen: Settings of the fitted head and of Reptile, as `scores_of` returned them.
    """
    episode = parts.test.pixels.episode(0)
    labels_S = episode.support_y
    support, query = (parts.test.prepare(x) for x in (episode.support_x, episode.query_x[:1]))
    head = chosen["gradient_head"]

    def encode() -> torch.Tensor:
        return parts.encoder(support.flatten(1))

    calls: dict[str, Callable[[], object]] = {
        "prototypes": lambda: prototypes(encode()[None], labels_S[None], config.way),
        "gradient_head": lambda: fit_head_autograd(
            encode(), labels_S, config.way, learning_rate=head["rate"], num_steps=head["steps"]
        ),
    }
    for name, generator in parts.generators.items():
        calls[name] = lambda generator=generator: generated_heads(
            generator, parts.layout, encode()[None], labels_S[None], 0
        )
    first = parts.generators[HEADLINES[config.generator][0]]
    calls["adapt"] = lambda: chosen_classifier(first, parts.encoder, parts.test, 0)
    for name in ROWS:
        calls[name] = lambda name=name: rows.logits(name, support, labels_S, query, config.way)
    if config.reptile_episodes:
        learner, steps = Learner(parts.network, config.reptile), chosen["reptile"]["steps"]
        calls["reptile"] = lambda: learner.adapt(parts.reptile, support, labels_S, steps)
    calls |= {name: row.call(parts.test) for name, row in adapted.items()}
    times = time_alternating(calls, repetitions=_REPETITIONS, warm_up=1, clock=time.thread_time)
    return {f"ms_{name}": one.median_ms for name, one in times.items()}
