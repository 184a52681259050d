"""The objective of a search: accuracy of the networks that a trial's generator writes for tasks that it never saw.

Shape letters beyond the legend in `raywgen.weights`: T tasks.
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
    """Checks that a corpus has validation tasks.

    Raises:
        ConfigError: It has none.
    """
    if not any(task.split == _SPLIT for task in corpus.tasks.values()):
        raise ConfigError(
            f"{corpus.location} has no validation tasks to judge trials by; set zoo.num_validation_tasks above 0"
        )


@torch.no_grad()
def judge(bundle: str | Path, corpus: Corpus, shot: int, config: ObjectiveConfig) -> float:
    """Returns the balanced accuracy, averaged over validation tasks and then over architectures.

    Args:
        bundle: Folder of the generator.
        corpus: Corpus that it was trained on.
        shot: Labelled examples of each class in a condition, as in training; 0 for those that the corpus keeps.
        config: The budget.
    """
    generator = load_bundle(bundle).eval()
    means = []
    for layout_id in corpus.networks:
        normalizer = generator.normalizers[layout_id][1]
        evaluator = make_evaluator(corpus, layout_id, _SPLIT, normalizer, config.num_tasks)
        if evaluator is not None:
            means.append(_accuracy(evaluator, generator, shot, config))
    return sum(means) / len(means)


def _accuracy(evaluator: TaskEvaluator, generator: Generator, shot: int, config: ObjectiveConfig) -> float:
    if shot:
        noise = KeyedNoise(config.seed, torch.arange(len(evaluator.tasks)), _CONDITION_STREAM)
        evaluator = replace(evaluator, condition=draw_few_shot(evaluator.tasks, shot, 1, noise)[0])
    written = generated_candidates(evaluator, generator, config.best_of, config.temperature, config.seed)
    chosen_TD = evaluator.choose(written.values_BD.view(len(evaluator.tasks), config.best_of, -1))
    scores = []
    # Tasks may have test sets of different sizes, so they are evaluated one by one.
    for values_D, task in zip(chosen_TD, evaluator.tasks, strict=True):
        state = evaluator.layout.unflatten(values_D.unsqueeze(0))
        scores.append(balanced_accuracy(stacked_logits(evaluator.module, state, task.test_x_SF), task.test_y_S))
    return float(torch.cat(scores).mean())
