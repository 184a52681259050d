"""Compares heads for unseen classes, made from a few images: Mc-Di, its ablations, and methods without a generator.

All use one frozen encoder and the same episodes. Settings of the baselines (rate and steps of the fitted head, steps of
Reptile) are chosen on validation classes.

Shape letters beyond the legend in `raywgen.weights`: B episodes, S support samples, Q query samples.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from raywgen.benchmarks.chosen_heads import chosen_accuracies
from raywgen.benchmarks.encoder_worth import EncoderRows
from raywgen.benchmarks.few_shot_config import FewShotConfig
from raywgen.benchmarks.few_shot_parts import Parts, Side, TaskSource, build_parts
from raywgen.benchmarks.recipes import over_seeds
from raywgen.benchmarks.trained import HEADLINES
from raywgen.evaluation.few_shot import (
    Learner,
    Timing,
    accuracy,
    accuracy_by_steps,
    estimate,
    fewest_steps,
    fit_head_autograd,
    fit_heads,
    head_accuracies,
    head_logits,
    one_thread,
    paired_difference,
    prototype_logits,
    time_alternating,
)
from raywgen.generators import GenerationRequest, Generator
from raywgen.tasks.episodes import Episode
from raywgen.weights import Condition, KeyedNoise, Layout

_PERCENT = 100.0
_STEPS = (1, 2, 3, 5, 10, 20, 50)
_EPISODES_OF_A_BATCH = 100


def measure(config: FewShotConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Trains encoder, heads, generators and Reptile for every seed, then compares them on the test episodes."""
    root = config.root()
    rows, conditions = [], []
    for seed in config.all_seeds:
        parts = build_parts(config, root, seed, TaskSource(test_path=config.test_data))
        scores, chosen = scores_of(config, parts)
        rows_of_encoder = EncoderRows(parts.encoder, parts.seed)
        scores |= rows_of_encoder.accuracies(parts.test, config.num_episodes, config.way, ("encoder", "support"))
        figures, intervals = summarised(scores, HEADLINES[config.generator], ("prototypes",))
        chosen |= {"half_width_95": intervals, "encoder_validation": parts.encoder_accuracy}
        times, latency = _latency(config, parts, chosen)
        rows.append(figures | times)
        conditions.append(chosen | latency)
    means, spreads = over_seeds(rows)
    common = {"way": config.way, "shot": config.shot, "episodes": config.num_episodes, "each_seed": conditions}
    return means, config.conditions(spreads) | common


def scores_of(config: FewShotConfig, parts: Parts) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the accuracy `(B,)` of each method on the test episodes, and the settings chosen for the baselines."""
    validation, test = parts.validation.features, parts.test.features
    judged = head_accuracies(*support_of(validation), *query_of(validation), config.way, num_steps=_STEPS)
    rate, steps = max(judged, key=lambda key: float(judged[key].mean()))
    scores: dict[str, Tensor] = {
        name: generated_accuracy(generator, parts.layout, test, parts.seed)
        for name, generator in parts.generators.items()
    }
    scores |= _of_another_task(config, parts)
    first = parts.generators[HEADLINES[config.generator][0]]
    with one_thread():
        scores |= chosen_accuracies(first, parts.encoder, parts.test, config.num_episodes)
    scores["prototypes"] = accuracy(prototype_logits(*support_of(test), query_of(test)[0], config.way), test.query_y)
    heads = fit_heads(*support_of(test), config.way, learning_rate=rate, num_steps=[steps])
    scores["gradient_head"] = accuracy(head_logits(*heads[steps], query_of(test)[0]), test.query_y)
    chosen: dict[str, Any] = {"gradient_head": {"rate": rate, "steps": steps}}
    if config.reptile_episodes:
        with one_thread():
            scores["reptile"], chosen["reptile"] = _reptile(config, parts)
    return scores, chosen


def _of_another_task(config: FewShotConfig, parts: Parts) -> dict[str, Tensor]:
    """Returns the accuracy `(B,)` of the methods that are compared, given the examples of another task."""
    shuffled = shuffled_conditions(parts.test.features)
    return {
        f"shuffled_{name}": generated_accuracy(parts.generators[name], parts.layout, shuffled, parts.seed)
        for name in HEADLINES[config.generator]
    }


def shuffled_conditions(episodes: Episode) -> Episode:
    """Gives each of B episodes the support set of the one before it, and the first that of the last."""
    return replace(episodes, support_x=episodes.support_x.roll(1, 0), support_y=episodes.support_y.roll(1, 0))


def summarised(
    scores: Mapping[str, Tensor], names: Sequence[str], over: Sequence[str]
) -> tuple[dict[str, float], dict[str, float]]:
    """Returns mean accuracies in percent, differences between methods, and half widths of 95 % intervals of both.

    Args:
        scores: Accuracy `(B,)` of each method.
        names: Methods that are compared; the differences of the first one are called `over_OTHER`.
        over: Methods that they are compared with.
    """
    figures = {name: _PERCENT * float(score.mean()) for name, score in scores.items()}
    intervals = {name: round(_PERCENT * estimate(score).half_width, 3) for name, score in scores.items()}
    for name in names:
        for other in over:
            difference = paired_difference(scores[name], scores[other])
            key = f"over_{other}" if name == names[0] else f"{name}_over_{other}"
            figures[key] = _PERCENT * difference.mean
            intervals[key] = round(_PERCENT * difference.half_width, 3)
    return figures, intervals


@torch.no_grad()
def generated_accuracy(generator: Generator, layout: Layout, episodes: Episode, seed: int) -> Tensor:
    """Returns the accuracy `(B,)` of one generated head per episode."""
    scores = []
    for first in range(0, len(episodes.support_y), _EPISODES_OF_A_BATCH):
        rows = slice(first, first + _EPISODES_OF_A_BATCH)
        support_BSE, labels_BS = (part[rows] for part in support_of(episodes))
        weight_BCE, bias_BC = generated_heads(generator, layout, support_BSE, labels_BS, seed)
        query_BQE, query_y_BQ = (part[rows] for part in query_of(episodes))
        scores.append(accuracy(head_logits(weight_BCE, bias_BC, query_BQE), query_y_BQ))
    return torch.cat(scores)


def generated_heads(
    generator: Generator, layout: Layout, support_BSE: Tensor, labels_BS: Tensor, seed: int
) -> tuple[Tensor, Tensor]:
    """Generates weight `(B, C, E)` and bias `(B, C)` of one head per episode at temperature 0."""
    B = len(support_BSE)
    condition = Condition(instructions=("",) * B, samples_BSF=support_BSE, labels_BS=labels_BS)
    noise = KeyedNoise(seed, torch.arange(B, device=support_BSE.device), 0)
    state = layout.unflatten(
        generator.generate(
            GenerationRequest(condition=condition, layout=layout, noise=noise, temperature=0.0)
        ).values_BD
    )
    return state["weight"], state["bias"]


def _reptile(config: FewShotConfig, parts: Parts) -> tuple[Tensor, dict[str, Any]]:
    """Measures Reptile on the test episodes, at the number of steps that `fewest_steps` chooses on validation ones."""
    steps = (1, 2, 3, 5, 8, 12, 20)
    judged = reptile_accuracy(config, parts, parts.validation, min(config.num_validation, 200), steps)
    fewest = fewest_steps(judged, steps)
    scores = reptile_accuracy(config, parts, parts.test, config.reptile_episodes, [fewest])
    return scores[:, 0], {"steps": fewest, "validation": [round(v, 4) for v in judged.mean(dim=0).tolist()]}


def reptile_accuracy(
    config: FewShotConfig, parts: Parts, side: Side, num_episodes: int, num_steps: Sequence[int]
) -> Tensor:
    """Returns the accuracy `(B, K)` of the whole network that Reptile meta-trained, after K numbers of steps."""
    learners = [Learner(parts.network, config.reptile) for _ in range(os.cpu_count() or 1)]
    return accuracy_by_steps(
        learners, parts.reptile, side.pixels, prepare=side.prepare, num_episodes=num_episodes, num_steps=num_steps
    )


def _latency(config: FewShotConfig, parts: Parts, chosen: dict[str, Any]) -> tuple[dict[str, float], dict[str, Any]]:
    """Measures milliseconds per task from support images to weights on one thread; encoding is also shown apart."""
    pixels = parts.test.pixels.episode(0)
    x_SF = parts.test.prepare(pixels.support_x).flatten(1)
    labels_S, rate, steps = pixels.support_y, chosen["gradient_head"]["rate"], chosen["gradient_head"]["steps"]
    encode: Callable[[], Tensor] = lambda: parts.encoder(x_SF)  # noqa: E731
    calls: dict[str, Callable[[], object]] = {
        "encode": encode,
        "gradient_head": lambda: fit_head_autograd(encode(), labels_S, config.way, learning_rate=rate, num_steps=steps),
    }
    for name, generator in parts.generators.items():
        calls[name] = lambda generator=generator: generated_heads(
            generator, parts.layout, encode().unsqueeze(0), labels_S.unsqueeze(0), 0
        )
    if config.reptile_episodes:
        learner, reptile_steps = Learner(parts.network, config.reptile), chosen["reptile"]["steps"]
        support_x = parts.test.prepare(pixels.support_x).to(memory_format=torch.channels_last)
        calls["reptile"] = lambda: learner.adapt(parts.reptile, support_x, labels_S, reptile_steps)
    times = time_alternating(calls)
    many_BSF = x_SF.expand(64, -1, -1)
    many_labels = labels_S.expand(64, -1)

    def encode_many() -> Tensor:
        return parts.encoder(many_BSF.flatten(0, 1)).unflatten(0, (64, -1))

    batched = time_alternating(
        {
            "encode": encode_many,
            "gradient_head": lambda: fit_heads(
                encode_many(), many_labels, config.way, learning_rate=rate, num_steps=[steps]
            ),
            **{
                name: lambda name=name: generated_heads(
                    parts.generators[name], parts.layout, encode_many(), many_labels, 0
                )
                for name in HEADLINES[config.generator]
            },
        },
        repetitions=10,
        tasks_per_call=64,
    )
    figures = _medians("ms_", times) | _medians("ms_batch64_", batched)
    if "reptile" in times:
        name = config.generator
        figures[f"reptile_over_{name}"] = times["reptile"].median_ms / times[name].median_ms
    spread = {name: [round(one.low_ms, 3), round(one.high_ms, 3)] for name, one in times.items()}
    return figures, {"ms_quartiles": spread}


def _medians(prefix: str, times: dict[str, Timing]) -> dict[str, float]:
    return {f"{prefix}{name}": one.median_ms for name, one in times.items()}


def support_of(episodes: Episode) -> tuple[Tensor, Tensor]:
    """Returns features `(B, S, E)` and labels `(B, S)` of the support sets."""
    return episodes.support_x.flatten(2), episodes.support_y


def query_of(episodes: Episode) -> tuple[Tensor, Tensor]:
    """Returns features `(B, Q, E)` and labels `(B, Q)` of the query sets."""
    return episodes.query_x.flatten(2), episodes.query_y
