"""Evaluates a generator, its ablations and all baselines in one table, with a verdict.

Shape letters beyond the legend in `raywgen.weights`: T tasks, n candidates of a task.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from raywgen.config import to_yaml
from raywgen.corpus import Corpus
from raywgen.evaluation.baselines import BASELINES, SHARED_START_BASELINES, random_start
from raywgen.evaluation.claims import checked_claims
from raywgen.evaluation.config import EvaluateConfig
from raywgen.evaluation.finetuning import FineTuningConfig, fine_tune
from raywgen.evaluation.intervals import half_width
from raywgen.evaluation.novelty import median_distance, novelty_rows, verdict
from raywgen.evaluation.results import EVALUATION, Cell, Codebook, Evaluation, Novelty, NoveltyRow
from raywgen.evaluation.rows import ladder_rows
from raywgen.evaluation.task_evaluator import TaskEvaluator, generated_candidates, make_evaluator
from raywgen.evaluation.tokenizer_report import code_counts, tokenizer_report
from raywgen.generators import Generator
from raywgen.generators.bundle import load_bundle
from raywgen.generators.reporting import WeightCode
from raywgen.locations import joined
from raywgen.locks import only_one
from raywgen.nn.devices import resolved_device, say_device
from raywgen.out_folder import checked_out
from raywgen.storage import Storage
from raywgen.tasks import build_task
from raywgen.training.data import has_tasks
from raywgen.training.run_folder import BUNDLE, STAGES
from raywgen.training.stored_weights import StoredWeights, whole_blocks
from raywgen.trust import entry_point

SPLITS = ("seen", "unseen")
_PERCENT = 100.0
OnProgress = Callable[[int, int, str], None]


class EvaluationError(ValueError):
    """Generator and corpus do not fit each other; the message says what is missing."""


@entry_point
def evaluate(config: EvaluateConfig, on_progress: OnProgress | None = None) -> Evaluation:
    """Measures the whole ladder and writes `evaluation.json`.

    Args:
        config: Generator, corpus and budget.
        on_progress: Called with the number of evaluators done, their number, and the name of the next.

    Returns:
        The content of the file.

    Raises:
        OutError: Nothing can or should be written to `out`.
        BundleError: The generator cannot be read.
        DeviceError: A GPU is asked for, and there is none.
        CorpusError: The corpus cannot be read.
        EvaluationError: The corpus has a layout that the generator was not trained on, or holds weights alone.
        InUseError: Another process works on `out`.
    """
    config = replace(config, out=checked_out(config.out, EvaluateConfig.out))
    corpus = Corpus.open(config.corpus)
    device = resolved_device(config.device)
    say_device(f"{config.out}: networks run", config.device, device)
    generator = load_bundle(joined(config.generator, BUNDLE)).to(device)
    corpus.arrange(generator.layouts)
    with only_one(config.out):
        return _evaluate(config, corpus, generator, on_progress)


def _evaluate(
    config: EvaluateConfig, corpus: Corpus, generator: Generator, on_progress: OnProgress | None
) -> Evaluation:
    others = _other_generators(config, generator)
    cells: list[Cell] = []
    novelty: list[NoveltyRow] = []
    evaluators = _evaluators(config, corpus, generator)
    for done, (layout_id, evaluator) in enumerate(evaluators):
        if on_progress is not None:
            on_progress(done, len(evaluators), f"{evaluator.split} tasks, {evaluator.network}")
        networks = _networks(evaluator, config, generator, others, corpus.networks[layout_id].recipe)
        accuracy = {row: evaluator.accuracy(values_TD) for row, values_TD in networks.items()}
        accuracy |= _finetuned(evaluator, config, networks)
        cells += [_cell(evaluator, row, accuracy_T) for row, accuracy_T in accuracy.items()]
        # Originals that are among the stored networks lie at distance 0 from themselves.
        for row in ("generated", *(() if evaluator.is_shown else ("original",)), "noise"):
            novelty += novelty_rows(evaluator, row, networks[row], accuracy[row])
    if on_progress is not None:
        on_progress(len(evaluators), len(evaluators), "done")
    result = _result(config, corpus, generator, cells, novelty)
    storage = Storage.at(config.out)
    storage.write("config.yaml", to_yaml(config).encode())
    storage.write(EVALUATION, json.dumps(result.to_json(), indent=1).encode())
    return result


def _evaluators(config: EvaluateConfig, corpus: Corpus, generator: Generator) -> list[tuple[str, TaskEvaluator]]:
    """Returns an evaluator for each split of tasks and layout that the corpus has, with the layout's id."""
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
    evaluators = [
        (
            layout_id,
            make_evaluator(
                corpus,
                layout_id,
                split,
                generator.normalizers[layout_id][1],
                config.num_tasks,
                config.num_unlabelled,
                generator.device,
            ),
        )
        for split in SPLITS
        for layout_id in corpus.networks
    ]
    return [(layout_id, evaluator) for layout_id, evaluator in evaluators if evaluator is not None]


def _other_generators(config: EvaluateConfig, generator: Generator) -> dict[str, Generator]:
    """Returns the generators of further rows: earlier stages of the generator itself, and the hypernetwork."""
    others: dict[str, Generator] = {}
    for ablation in generator.ablations:
        folder = joined(config.generator, f"{STAGES}/{ablation.stage}")
        if Storage.at(folder).exists():
            others[ablation.row] = load_bundle(folder).to(generator.device)
    if config.hypernetwork:
        hypernetwork = load_bundle(joined(config.hypernetwork, BUNDLE))
        others["hypernetwork"] = hypernetwork.to(generator.device)
    return others


def _networks(
    evaluator: TaskEvaluator,
    config: EvaluateConfig,
    generator: Generator,
    others: dict[str, Generator],
    recipe: dict[str, Any],
) -> dict[str, Tensor]:
    """Returns the chosen network of each task for every row, `(T, D)` each."""
    originals_TD = evaluator.originals_TD.to(generator.device)
    networks = {
        "original": evaluator.originals_TD,
        "reconstructed": generator.reconstruct(originals_TD, evaluator.layout).cpu(),
        "generated": evaluator.choose(_written(evaluator, generator, config)),
        "random": evaluator.choose(random_start(evaluator, config, recipe)),
    }
    for name, other in others.items():
        networks[name] = evaluator.choose(_written(evaluator, other, config))
    if len(evaluator.tasks) > 1:
        told = evaluator.told_the_next_task()
        networks["shuffled"] = told.choose(_written(told, generator, config))
    for name, baseline in (BASELINES | (SHARED_START_BASELINES if evaluator.has_start else {})).items():
        networks[name] = evaluator.choose(baseline(evaluator, config))
    return networks


def _finetuned(evaluator: TaskEvaluator, config: EvaluateConfig, networks: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the accuracy `(T,)` of every row of fine-tuning; all starts are trained in the same way."""
    starts = {
        "finetuned": networks["generated"],
        "nearest_finetuned": networks["nearest_loss"],
        "random_finetuned": networks["random"],
    } | ({"start_finetuned": networks["shared_start"]} if evaluator.has_start else {})
    settings = FineTuningConfig(
        epochs=max(config.finetune_epochs), learning_rates=config.finetune_learning_rates, seed=config.seed
    )
    tuned = fine_tune(evaluator.module, evaluator.layout, starts, evaluator.tasks, settings)
    return {
        f"{name}_{epochs}": one.accuracy_TE[:, epochs]
        for epochs in config.finetune_epochs
        for name, one in tuned.items()
    }


def _written(evaluator: TaskEvaluator, generator: Generator, config: EvaluateConfig) -> Tensor:
    written = generated_candidates(evaluator, generator, config.best_of, config.temperature, config.seed)
    return written.values_BD.view(len(evaluator.tasks), config.best_of, -1)


def _cell(evaluator: TaskEvaluator, row: str, accuracy_T: Tensor) -> Cell:
    count = len(accuracy_T)
    deviation = float(accuracy_T.std()) if count > 1 else 0.0
    return Cell(
        split=evaluator.split,
        layout=evaluator.network,
        row=row,
        accuracy=float(accuracy_T.mean()),
        ci95=half_width(deviation, count),
        num_networks=count,
    )


def _result(
    config: EvaluateConfig, corpus: Corpus, generator: Generator, cells: list[Cell], novelty: list[NoveltyRow]
) -> Evaluation:
    figures = _figures(cells, novelty)
    word, sentence = verdict(novelty, figures)
    task, code = next(iter(corpus.tasks.values())), generator.weight_code()
    return Evaluation(
        num_test_images=len(build_task(task.recipe).test_y_S),
        best_of=config.best_of,
        num_samples=len(task.labels_S),
        layouts=tuple(network.name for network in corpus.networks.values()),
        rows=ladder_rows(config.finetune_epochs, {cell.row for cell in cells}, generator.ablations),
        ladder=tuple(cells),
        novelty=Novelty(
            rows=tuple(novelty),
            reference_distance=median_distance(novelty, "original"),
            verdict=word,
            verdict_text=sentence,
        ),
        codebook=None if code is None else _codebook(code, corpus, generator.device),
        tokenizer=None if code is None else tokenizer_report(generator, code, corpus),
        figures=figures,
        claims=checked_claims(figures),
    )


def _figures(cells: list[Cell], novelty: list[NoveltyRow]) -> dict[str, float]:
    """Returns means over tasks and architectures in percent; retrieval counts with its better kind."""
    figures: dict[str, float] = {}
    splits = [split for split in SPLITS if any(cell.split == split for cell in cells)]
    for split in splits:
        for row in dict.fromkeys(cell.row for cell in cells if cell.split == split):
            accuracies = [cell.accuracy for cell in cells if (cell.split, cell.row) == (split, row)]
            figures[f"{split}_{row}"] = _PERCENT * sum(accuracies) / len(accuracies)
        figures[f"{split}_nearest"] = max(figures[f"{split}_nearest_condition"], figures[f"{split}_nearest_loss"])
    figures["random"] = sum(figures[f"{split}_random"] for split in splits) / len(splits)
    if original := median_distance(novelty, "original"):
        figures["novelty_distance"] = median_distance(novelty, "generated") / original
    return {name: round(value, 4) for name, value in figures.items()}


@torch.no_grad()
def _codebook(code: WeightCode, corpus: Corpus, device: torch.device) -> Codebook:
    """Counts the uses of each code of each level on held-out networks; on training networks where none is held out."""
    usage_LV = torch.zeros(code.num_levels, code.num_codes, dtype=torch.int64)
    for layout_id, network in corpus.networks.items():
        rows = corpus.select(layout_id=layout_id, split="heldout")
        rows = rows if rows.num_rows else corpus.select(layout_id=layout_id, split="train")
        weights = StoredWeights(corpus, network.layout, rows)
        for _, values_BD in whole_blocks(weights, network.layout.num_values):
            codes_BWL = code.encode(values_BD.to(device), network.layout)
            usage_LV += code_counts(codes_BWL.cpu(), code.num_codes)
    return Codebook(codes=code.num_codes, usage=tuple(map(tuple, usage_LV.tolist())))
