"""What a trial is worth: accuracy of the networks that its generator writes for tasks that it never saw.

Shape legend: T tasks, n candidates of a task, D values.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from raywgen.config import ConfigError
from raywgen.corpus import Corpus
from raywgen.evaluation.task_evaluator import TaskEvaluator, generated_candidates, make_evaluator
from raywgen.generators import Generator
from raywgen.generators.bundle import load_bundle
from raywgen.tasks import balanced_accuracy, draw_few_shot, stacked_logits
from raywgen.tuning.config import ObjectiveConfig
from raywgen.weights import KeyedNoise

_SPLIT = "validation"
_CONDITION_STREAM = 3_000


def check_corpus(corpus: Corpus) -> None:
    """There are tasks to choose by.

    Raises:
        ConfigError: There are none.
    """
    if not any(task.split == _SPLIT for task in corpus.tasks.values()):
        raise ConfigError(
            f"{corpus.location} has no validation tasks to judge trials by; set zoo.num_validation_tasks above 0"
        )


@torch.no_grad()
def judge(bundle: str | Path, corpus: Corpus, shot: int, config: ObjectiveConfig) -> float:
    """Mean balanced accuracy over validation tasks, then over architectures.

    Args:
        bundle: Of the generator.
        corpus: That it was trained on.
        shot: Labelled examples of each class that it is told, as in its training; 0 for those that the corpus keeps.
        config: The budget.
    """
    generator = load_bundle(bundle).eval()
    means = []
    for layout_id in corpus.networks:
        normalizer = generator.normalizers[layout_id][1]
        bench = make_evaluator(corpus, layout_id, _SPLIT, normalizer, config.num_tasks)
        if bench is not None:
            means.append(_accuracy(bench, generator, shot, config))
    return sum(means) / len(means)


def _accuracy(bench: TaskEvaluator, generator: Generator, shot: int, config: ObjectiveConfig) -> float:
    if shot:
        noise = KeyedNoise(config.seed, torch.arange(len(bench.tasks)), _CONDITION_STREAM)
        bench = replace(bench, condition=draw_few_shot(bench.tasks, shot, 1, noise)[0])
    written = generated_candidates(bench, generator, config.best_of, config.temperature, config.seed)
    chosen_TD = bench.choose(written.values_BD.view(len(bench.tasks), config.best_of, -1))
    scores = []
    # One by one, because tasks may have test sets of different sizes.
    for values_D, task in zip(chosen_TD, bench.tasks, strict=True):
        state = bench.layout.unflatten(values_D.unsqueeze(0))
        scores.append(balanced_accuracy(stacked_logits(bench.module, state, task.test_x_SF), task.test_y_S))
    return float(torch.cat(scores).mean())
