"""Compares heads for data that meta-training never saw: each of several domains or data sets is left out in turn.

The encoder is trained on the plain images of the first one, which is therefore never left out. Beside the baselines of
the few-shot benchmark there are those that a generator must beat to be worth its training: the average of all stored
heads; the stored head with the lowest loss on the support set; and no adaptation, which is the head made for the plain
images of the same classes or, for other data, the untrained head. The rows of `encoder_worth` and `adapted_rows` show
what the encoder's last features are worth, `adapt` what `raywgen adapt` makes of the examples, and `shuffled_METHOD`
what a method makes of those of another task. All data are standardised by the mean and deviation of their own pixels,
in all rows.

Shape letters beyond the legend in `raywgen.weights`: B episodes, S support samples, Q query samples, N stored heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

import torch
from torch import Tensor

from raywgen.benchmarks.adapted_rows import Adaptation, from_scratch, reptile_head
from raywgen.benchmarks.chosen_heads import chosen_accuracies
from raywgen.benchmarks.encoder_worth import EncoderRows
from raywgen.benchmarks.few_shot import (
    generated_accuracy,
    query_of,
    reptile_accuracy,
    scores_of,
    summarised,
    support_of,
)
from raywgen.benchmarks.few_shot_config import FewShotConfig
from raywgen.benchmarks.few_shot_parts import Parts, TaskSource, build_parts, test_side
from raywgen.benchmarks.recipes import over_seeds
from raywgen.benchmarks.row_times import row_times
from raywgen.benchmarks.trained import HEADLINES
from raywgen.corpus import Corpus
from raywgen.evaluation.few_shot import accuracy, head_logits, one_thread, prototype_logits
from raywgen.tasks.episodes import Episode

_EPISODES_OF_A_BATCH = 50
_BASELINES = ("prototypes", "average", "nearest", "no_adaptation")


def leave_out(
    config: FewShotConfig, domains: list[str], unmatched: Mapping[str, str] | None = None
) -> tuple[dict[str, float], dict[str, Any]]:
    """Leaves every domain but the first out in turn, for every seed.

    Args:
        config: Methods to train and compare.
        domains: `DOMAIN`, or `PATH::DOMAIN` for other data.
        unmatched: For some of the other data, the images as they were before they were made to look like those known.

    Returns:
        For each method its mean over what is left out, and `METHOD/LEFT_OUT` for each; `unmatched_METHOD` on the images
        of `unmatched`; `ms_METHOD`, as `row_times` measures it on what is left out first; and the conditions.
    """
    if config.test_data:
        raise ValueError(f"test_data={config.test_data}: what is left out is tested on; leave it out")
    names = [short_name(domain) for domain in domains]
    if len(set(names)) < len(names):
        raise ValueError(f"{', '.join(domains)}: two have one name; rename a file")
    root = config.root()
    rows, conditions = [], []
    for seed in config.all_seeds:
        row: dict[str, float] = {}
        once: dict[str, Any] = {}
        for left_out in domains[1:]:
            parts = build_parts(config, root, seed, task_source(domains, left_out))
            scores, chosen = _measured(
                config, parts, task_source(domains, left_out), once, (unmatched or {}).get(left_out)
            )
            figures, intervals = summarised(scores, HEADLINES[config.generator], _BASELINES)
            row |= {f"{name}/{short_name(left_out)}": value for name, value in figures.items()}
            conditions.append({"seed": seed, "left_out": left_out, "half_width_95": intervals} | chosen)
        rows.append(_with_means(row) | once["times"])
    means, spreads = over_seeds(rows)
    common = {"way": config.way, "shot": config.shot, "episodes": config.num_episodes, "domains": domains}
    if config.reptile_episodes:
        common["episodes_of_adapting_networks"] = config.reptile_episodes
    return means, config.conditions(spreads) | common | {"each": conditions}


def _measured(
    config: FewShotConfig, parts: Parts, source: TaskSource, once: dict[str, Any], unmatched: str | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the accuracy `(B,)` of each method on one left-out domain, and what was chosen for the baselines.

    Args:
        config: Settings.
        parts: What is compared.
        source: What is left out.
        once: What is the same for all that is left out with one seed; filled where it is empty.
        unmatched: Path of the left-out images as they were.
    """
    adapted: dict[str, Adaptation] = {}
    if config.reptile_episodes:
        if "from_scratch" not in once:
            once["from_scratch"] = from_scratch(config, parts)
        adapted = {"from_scratch": once["from_scratch"], "reptile_head": reptile_head(config, parts, source)}
    encoders = EncoderRows(parts.encoder, parts.seed)
    scores, chosen = scores_of(config, parts)
    chosen |= {name: one.settings() for name, one in adapted.items()}
    if "times" not in once:
        once["times"] = row_times(config, parts, encoders, adapted, chosen)
    scores |= _baselines(config, parts, source) | _rows(config, parts, encoders, adapted)
    if unmatched:
        side = test_side(config, parts.encoder, parts.seed, replace(source, test_path=unmatched))
        scores |= _unmatched(config, replace(parts, test=side), encoders, chosen)
    return scores, chosen


def task_source(domains: list[str], left_out: str) -> TaskSource:
    """Returns a task source that meta-trains on all domains but one, which comes last."""
    path, _, domain = left_out.rpartition("::")
    known = [domain for domain in domains if domain != left_out]
    return TaskSource(domains=(*known, left_out), test_path=path, test_domain=domain)


def short_name(domain: str) -> str:
    """Shortens `PATH::DOMAIN` by its folders, and by the plain domain."""
    path, _, seen = domain.rpartition("::")
    name = PurePosixPath(path).stem
    return seen if not path else name if seen == "plain" else f"{name}-{seen}"


def _with_means(row: dict[str, float]) -> dict[str, float]:
    """Puts means over all left-out domains before the figures of each."""
    of_method: dict[str, list[float]] = {}
    for name, value in row.items():
        of_method.setdefault(name.partition("/")[0], []).append(value)
    return {name: sum(values) / len(values) for name, values in of_method.items()} | row


def _rows(
    config: FewShotConfig, parts: Parts, encoders: EncoderRows, adapted: Mapping[str, Adaptation]
) -> dict[str, Tensor]:
    """Returns the accuracy `(B,)` of the rows of encoders, and of those that adapt."""
    scores = encoders.accuracies(parts.test, config.num_episodes, config.way)
    scores |= {name: one.accuracy(parts.test, config.reptile_episodes) for name, one in adapted.items()}
    return scores


def _unmatched(
    config: FewShotConfig, parts: Parts, encoders: EncoderRows, chosen: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Returns the accuracy `(B,)` of methods whose features depend on the polarity of the images."""
    test = parts.test.features
    scores = {
        "prototypes": accuracy(prototype_logits(*support_of(test), query_of(test)[0], config.way), test.query_y),
        **encoders.accuracies(parts.test, config.num_episodes, config.way),
    }
    for name in HEADLINES[config.generator]:
        scores[name] = generated_accuracy(parts.generators[name], parts.layout, test, parts.seed)
    first = parts.generators[HEADLINES[config.generator][0]]
    with one_thread():
        scores["adapt"] = chosen_accuracies(first, parts.encoder, parts.test, config.num_episodes)["adapt"]
    if config.reptile_episodes:
        with one_thread():
            steps = [chosen["reptile"]["steps"]]
            scores["reptile"] = reptile_accuracy(config, parts, parts.test, config.reptile_episodes, steps)[:, 0]
    return {f"unmatched_{name}": score for name, score in scores.items()}


def _baselines(config: FewShotConfig, parts: Parts, source: TaskSource) -> dict[str, Tensor]:
    """Returns the accuracy `(B,)` of each baseline that needs no generator."""
    test, layout = parts.test.features, parts.layout
    stored_ND = parts.corpus.values(parts.corpus.query(["split=train", f"step={_last_step(parts.corpus)}"]))
    heads = layout.unflatten(stored_ND)
    mean = layout.unflatten(stored_ND.mean(dim=0, keepdim=True))
    return {
        "average": nearest_head_accuracy(mean["weight"], mean["bias"], test),
        "nearest": nearest_head_accuracy(heads["weight"], heads["bias"], test),
        "no_adaptation": _unadapted(config, parts, source),
    }


def _unadapted(config: FewShotConfig, parts: Parts, source: TaskSource) -> Tensor:
    """Measures heads made for the plain images of the same classes; for other data, the start of training."""
    test = parts.test.features
    if source.test_path:
        base_D = parts.corpus.base_values(parts.layout.id)
        assert base_D is not None, "the heads of the recipe share their start"
        head = parts.layout.unflatten(base_D.unsqueeze(0))
        return nearest_head_accuracy(head["weight"], head["bias"], test)
    plain = test_side(config, parts.encoder, parts.seed, TaskSource()).features
    return accuracy(prototype_logits(*support_of(plain), query_of(test)[0], config.way), test.query_y)


@torch.no_grad()
def nearest_head_accuracy(weight_NCE: Tensor, bias_NC: Tensor, episodes: Episode) -> Tensor:
    """Chooses, of N heads, the one with the lowest loss on each episode's support set; returns its accuracy `(B,)`."""
    scores = []
    for first in range(0, len(episodes.support_y), _EPISODES_OF_A_BATCH):
        rows = slice(first, first + _EPISODES_OF_A_BATCH)
        support_BSE, labels_BS = (part[rows] for part in support_of(episodes))
        logits_BSNC = torch.einsum("bse,nce->bsnc", support_BSE, weight_NCE) + bias_NC
        right_BSN = logits_BSNC.gather(3, labels_BS[..., None, None].expand(*logits_BSNC.shape[:3], 1)).squeeze(3)
        best_B = (logits_BSNC.logsumexp(dim=3) - right_BSN).mean(dim=1).argmin(dim=1)
        query_BQE, query_y_BQ = (part[rows] for part in query_of(episodes))
        scores.append(accuracy(head_logits(weight_NCE[best_B], bias_NC[best_B], query_BQE), query_y_BQ))
    return torch.cat(scores)


def _last_step(corpus: Corpus) -> int:
    return max(corpus.facts.column("step").to_pylist())
