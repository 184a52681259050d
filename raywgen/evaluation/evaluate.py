"""Puts a generator, its ablations and all baselines on one table, and says what came out.

Shape legend: T tasks, n candidates of a task, D values.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raywgen.config import save_config
from raywgen.corpus import Corpus
from raywgen.evaluation.baselines import BASELINES, OF_A_SHARED_START, random_start
from raywgen.evaluation.config import EvaluateConfig
from raywgen.evaluation.finetuning import FineTuningConfig, fine_tune
from raywgen.evaluation.novelty import median_distance, points, verdict
from raywgen.evaluation.rows import rungs
from raywgen.evaluation.task_evaluator import TaskEvaluator, generated_candidates, make_evaluator
from raywgen.evaluation.tokenizer_report import tokenizer_report
from raywgen.files import write_text
from raywgen.generators import Generator
from raywgen.generators.bundle import load_bundle
from raywgen.generators.igpg import IGPG
from raywgen.locks import only_one
from raywgen.tasks import build_task
from raywgen.training.data import has_tasks
from raywgen.trust import entry_point

EVALUATION = "evaluation.json"
SPLITS = ("seen", "unseen")
_PRIOR = "stages/prior"
_POINTS = 100.0


class EvaluationError(ValueError):
    """A generator and a corpus that do not fit each other; the message says what is missing."""


@entry_point
def evaluate(config: EvaluateConfig, on_progress: Callable[[int, int, str], None] | None = None) -> dict[str, Any]:
    """Measures the whole ladder and writes `evaluation.json`.

    Args:
        config: Generator, corpus and budget.
        on_progress: Called with benches done, their number, and a name.

    Returns:
        What was written: rows of the ladder, novelty, figures in points, claims.

    Raises:
        BundleError: The generator cannot be read.
        CorpusError: The corpus cannot be read.
        EvaluationError: The corpus has a layout that the generator was not trained on, or only weights are known.
        InUseError: Another process works on `out`.
    """
    corpus = Corpus.open(config.corpus)
    generator = load_bundle(Path(config.generator) / "generator")
    corpus.arrange(generator.layouts)
    with only_one(config.out):
        return _evaluate(config, corpus, generator, on_progress)


def _evaluate(
    config: EvaluateConfig,
    corpus: Corpus,
    generator: Generator,
    on_progress: Callable[[int, int, str], None] | None,
) -> dict[str, Any]:
    rivals = _rivals(config)
    rows: list[dict[str, Any]] = []
    novelty: list[dict[str, Any]] = []
    benches = _benches(config, corpus, generator)
    for done, (layout_id, bench) in enumerate(benches):
        if on_progress is not None:
            on_progress(done, len(benches), f"{bench.split} tasks, {bench.network}")
        networks = _networks(bench, config, generator, rivals, corpus.networks[layout_id].recipe)
        accuracy = {rung: bench.accuracy(values_TD) for rung, values_TD in networks.items()}
        accuracy |= _finetuned(bench, config, networks)
        rows += [_row(bench, rung, accuracy_T) for rung, accuracy_T in accuracy.items()]
        # Originals that were stored lie at no distance from themselves.
        for rung in ("generated", *(() if bench.is_shown else ("original",)), "noise"):
            novelty += points(bench, rung, networks[rung], accuracy[rung])
    if on_progress is not None:
        on_progress(len(benches), len(benches), "done")
    result = _result(config, corpus, generator, rows, novelty)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    save_config(config, out / "config.yaml")
    write_text(out / EVALUATION, json.dumps(result, indent=1))
    return result


def _benches(config: EvaluateConfig, corpus: Corpus, generator: Generator) -> list[tuple[str, TaskEvaluator]]:
    """One for each split of tasks and layout that there is, with the layout's id."""
    if not has_tasks(corpus):
        raise EvaluationError(
            f"{config.corpus} holds weights alone; say what its networks do and how they are built by `raywgen corpus "
            "describe`, and train anew"
        )
    for layout_id, network in corpus.networks.items():
        if layout_id not in generator.normalizers:
            raise EvaluationError(
                f"{config.generator} was not trained on layout {network.name} of {config.corpus}; evaluate it on its "
                "own corpus"
            )
    benches = [
        (
            layout_id,
            make_evaluator(
                corpus, layout_id, split, generator.normalizers[layout_id][1], config.num_tasks, config.num_unlabelled
            ),
        )
        for split in SPLITS
        for layout_id in corpus.networks
    ]
    return [(layout_id, bench) for layout_id, bench in benches if bench is not None]


def _rivals(config: EvaluateConfig) -> dict[str, Generator]:
    rivals: dict[str, Generator] = {}
    if (Path(config.generator) / _PRIOR).is_dir():
        rivals["token_prior"] = load_bundle(Path(config.generator) / _PRIOR)
    if config.hypernetwork:
        rivals["hypernetwork"] = load_bundle(Path(config.hypernetwork) / "generator")
    return rivals


def _networks(
    bench: TaskEvaluator,
    config: EvaluateConfig,
    generator: Generator,
    rivals: dict[str, Generator],
    recipe: dict[str, Any],
) -> dict[str, Tensor]:
    """The chosen network of each task on every rung, `(T, D)` each."""
    networks = {
        "original": bench.originals_TD,
        "reconstructed": generator.reconstruct(bench.originals_TD, bench.layout),
        "generated": bench.choose(_written(bench, generator, config)),
        "random": bench.choose(random_start(bench, config, recipe)),
    }
    for name, rival in rivals.items():
        networks[name] = bench.choose(_written(bench, rival, config))
    for name, baseline in (BASELINES | (OF_A_SHARED_START if bench.has_start else {})).items():
        networks[name] = bench.choose(baseline(bench, config))
    return networks


def _finetuned(bench: TaskEvaluator, config: EvaluateConfig, networks: dict[str, Tensor]) -> dict[str, Tensor]:
    """Accuracy `(T,)` on every rung of fine-tuning, from each start alike."""
    starts = {
        "finetuned": networks["generated"],
        "nearest_finetuned": networks["nearest_loss"],
        "random_finetuned": networks["random"],
    } | ({"start_finetuned": networks["shared_start"]} if bench.has_start else {})
    settings = FineTuningConfig(
        epochs=max(config.finetune_epochs), learning_rates=config.finetune_learning_rates, seed=config.seed
    )
    tuned = fine_tune(bench.module, bench.layout, starts, bench.tasks, settings)
    return {
        f"{name}_{epochs}": one.accuracy_TE[:, epochs]
        for epochs in config.finetune_epochs
        for name, one in tuned.items()
    }


def _written(bench: TaskEvaluator, generator: Generator, config: EvaluateConfig) -> Tensor:
    written = generated_candidates(bench, generator, config.best_of, config.temperature, config.seed)
    return written.values_BD.view(len(bench.tasks), config.best_of, -1)


def _row(bench: TaskEvaluator, rung: str, accuracy_T: Tensor) -> dict[str, Any]:
    count = len(accuracy_T)
    spread = float(accuracy_T.std()) if count > 1 else 0.0
    return {
        "split": bench.split,
        "layout": bench.network,
        "rung": rung,
        "accuracy": float(accuracy_T.mean()),
        "ci95": 1.96 * spread / math.sqrt(count),
        "num_networks": count,
    }


def _result(
    config: EvaluateConfig,
    corpus: Corpus,
    generator: Generator,
    rows: list[dict[str, Any]],
    novelty: list[dict[str, Any]],
) -> dict[str, Any]:
    figures = _figures(rows, novelty)
    word, sentence = verdict(novelty, figures)
    task = next(iter(corpus.tasks.values()))
    return {
        "schema_version": 1,
        "num_test_images": len(build_task(task.recipe).test_y_S),
        "best_of": config.best_of,
        "num_samples": len(task.labels_S),
        "layouts": [network.name for network in corpus.networks.values()],
        "rungs": rungs(config.finetune_epochs, {row["rung"] for row in rows}),
        "ladder": rows,
        "novelty": {
            "points": novelty,
            "reference_distance": median_distance(novelty, "original"),
            "verdict": word,
            "verdict_text": sentence,
        },
        "codebook": _codebook(generator, corpus),
        "tokenizer": asdict(tokenizer_report(generator, corpus)) if isinstance(generator, IGPG) else None,
        "figures": figures,
        "claims": _claims(figures),
    }


def _figures(rows: list[dict[str, Any]], novelty: list[dict[str, Any]]) -> dict[str, float]:
    """Means over tasks and architectures, in points; retrieval counts with its better kind."""
    figures: dict[str, float] = {}
    splits = [split for split in SPLITS if any(row["split"] == split for row in rows)]
    for split in splits:
        for rung in dict.fromkeys(row["rung"] for row in rows if row["split"] == split):
            of_rung = [row["accuracy"] for row in rows if (row["split"], row["rung"]) == (split, rung)]
            figures[f"{split}_{rung}"] = _POINTS * sum(of_rung) / len(of_rung)
        figures[f"{split}_nearest"] = max(figures[f"{split}_nearest_condition"], figures[f"{split}_nearest_loss"])
    figures["random"] = sum(figures[f"{split}_random"] for split in splits) / len(splits)
    if original := median_distance(novelty, "original"):
        figures["novelty_distance"] = median_distance(novelty, "generated") / original
    return {name: round(value, 4) for name, value in figures.items()}


def _claims(figures: dict[str, float]) -> list[dict[str, Any]]:
    """What the demo sets out to show, each held or not; of a corpus that has less, what can be said of it."""
    claims = [
        ("seen_reconstructed", "seen_original", ">=", 1.0, -1.0),
        ("seen_generated", "seen_original", ">=", 0.95, 0.0),
    ]
    rivals = ("nearest", "average", "gaussian", "gradient")
    claims += [("unseen_generated", f"unseen_{rival}", ">", 1.0, 0.0) for rival in rivals]
    claims += [("unseen_generated", "unseen_original", ">=", 0.9, 0.0)]
    rows = []
    for name, other, sign, factor, offset in claims:
        if name not in figures or other not in figures:
            continue
        bound = factor * figures[other] + offset
        told = (f"{factor:g} * " if factor != 1 else "") + other + (f" - {-offset:.1f}" if offset else "")
        holds = figures[name] > bound if sign == ">" else figures[name] >= bound
        rows.append({"text": f"{name} {sign} {told}", "holds": holds})
    return rows


@torch.no_grad()
def _codebook(generator: Generator, corpus: Corpus) -> dict[str, Any] | None:
    """How often each code of each level is used on networks that the tokeniser never saw, where some were held out."""
    if not isinstance(generator, IGPG):
        return None
    quantiser = generator.tokenizer.quantiser
    usage_LV = torch.zeros(quantiser.num_levels, quantiser.num_codes, dtype=torch.int64)
    for layout_id, network in corpus.networks.items():
        rows = corpus.select(layout_id=layout_id, split="heldout")
        values_ND = corpus.values(rows if rows.num_rows else corpus.select(layout_id=layout_id, split="train"))
        codes_NL = generator.tokens(values_ND, network.layout).flatten(0, 1)
        for level in range(quantiser.num_levels):
            usage_LV[level] += torch.bincount(codes_NL[:, level], minlength=quantiser.num_codes)
    return {"levels": quantiser.num_levels, "codes": quantiser.num_codes, "usage": usage_LV.tolist()}
