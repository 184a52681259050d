"""Finds the stored networks nearest to a task: by their loss on its samples, else by the similarity of their tasks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import pyarrow as pa
from torch import Tensor

from raywgen.corpus import Corpus
from raywgen.evaluation.request import TaskRequest, read_task_request
from raywgen.evaluation.stored_scores import MisfitError, stored_scores, trained_ends
from raywgen.evaluation.task_similarity import data_similarity, text_similarity
from raywgen.files import write_text
from raywgen.generation import ConditionError
from raywgen.out_folder import local_file
from raywgen.trust import entry_point
from raywgen.weights import save_state_dict

Ranking = Literal["auto", "loss", "accuracy", "similarity"]


@dataclass(kw_only=True)
class RetrieveConfig:
    """The settings of a search for the stored networks nearest to a task.

    Attributes:
        corpus: Corpus of the networks: a path or URI.
        task: Id of a task of the corpus; empty for one of your own.
        instruction: A task of your own in words.
        data: Samples of that task: an `.npz` file with arrays `x` (samples first) and, where labels are known, `y`; or
            a Parquet file, glob or folder of labelled images.
        where: Facts that networks must satisfy, such as `[architecture=tiny-cnn, split=train, test_accuracy>0.9]`.
        by: `loss` or `accuracy` on the labelled samples; `similarity` of instruction and data to those of the tasks
            that networks were trained on; or `auto`, which takes the loss if there are labels, else the similarity.
        top: Number of networks to list.
        num_samples: Maximum number of samples that networks are tried on, equally many of each class.
        out: File for the nearest network, `.safetensors`; a `.json` beside it lists all that were found. Empty to write
            neither.
    """

    corpus: str = "runs/zoo/corpus"
    task: str = ""
    instruction: str = ""
    data: str = ""
    where: list[str] = field(default_factory=list)
    by: Ranking = "auto"
    top: int = 10
    num_samples: int = 512
    out: str = "retrieved.safetensors"

    def __post_init__(self) -> None:
        if min(self.top, self.num_samples) < 1:
            raise ValueError("top and num_samples must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One stored network.

    Attributes:
        checkpoint_id: Its name in the corpus.
        architecture: Name of its architecture.
        task_id: Id of the task that it was trained on; None where the corpus does not say.
        instruction: Instruction of that task.
        test_accuracy: Balanced accuracy on the test samples of that task; None where unknown.
        loss: Class-balanced loss on the labelled samples of the request, nats; None without labels.
        accuracy: Balanced accuracy on these samples; None without labels.
        text_similarity: Similarity of the two instructions, in [0, 1]; None where one is missing.
        data_similarity: Similarity of the two tasks' samples, in [0, 1]; None likewise.
    """

    checkpoint_id: str
    architecture: str
    task_id: str | None
    instruction: str
    test_accuracy: float | None
    loss: float | None = None
    accuracy: float | None = None
    text_similarity: float | None = None
    data_similarity: float | None = None

    @property
    def similarity(self) -> float:
        """Mean of the similarities that are known; -1 where none is."""
        known = [value for value in (self.text_similarity, self.data_similarity) if value is not None]
        return sum(known) / len(known) if known else -1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Retrieved:
    """The networks that were found.

    Attributes:
        networks: The nearest ones, nearest first.
        by: Criterion of the ranking: `loss`, `accuracy` or `similarity`.
        num_tried: Number of networks that were compared.
        left_out: Reasons why networks of an architecture could not be compared, one sentence each.
    """

    networks: list[Found]
    by: str
    num_tried: int
    left_out: list[str]


@entry_point
def retrieve(config: RetrieveConfig, on_progress: Callable[[int, int, str], None] | None = None) -> Retrieved:
    """Ranks the ends of all stored trajectories and writes the nearest.

    Args:
        config: Settings of the search.
        on_progress: Called with the number of networks done, the number of all, and the name of an architecture.

    Raises:
        ConditionError: The request cannot be read, or nothing in the corpus can be compared with it.
        CorpusError, UnknownFactError: The corpus cannot be read, or has no such task or fact.
        OutError: `out` is a URI.
        WeightsError: The file cannot be written.
    """
    if config.out:
        local_file(config.out, RetrieveConfig.out, "raywgen retrieve")
    corpus = Corpus.open(config.corpus)
    named = {"task": config.task, "instruction": config.instruction, "data": config.data}
    request = read_task_request(corpus, **named, num_samples=config.num_samples)
    found = nearest(corpus, request, where=config.where, by=config.by, top=config.top, on_progress=on_progress)
    if config.out:
        best = found.networks[0]
        save_state_dict(corpus.state_dict(best.checkpoint_id), config.out, {"checkpoint_id": best.checkpoint_id})
        content = {"config": asdict(config), "found": asdict(found)}
        write_text(Path(config.out).with_suffix(".json"), json.dumps(content, indent=1))
    return found


def nearest(
    corpus: Corpus,
    request: TaskRequest,
    *,
    where: list[str] | None = None,
    by: Ranking = "auto",
    top: int = 10,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> Retrieved:
    """Ranks the ends of all stored trajectories; arguments and errors are those of `retrieve`."""
    if by == "auto":
        by = "similarity" if request.labels_S is None else "loss"
    if by != "similarity" and request.labels_S is None:
        raise ConditionError(f"by={by} needs labelled samples; give data=FILE with x and y, or by=similarity")
    facts = trained_ends(corpus, where or [])
    scores, left_out = _scores(corpus, facts, request, on_progress)
    if request.labels_S is not None and not scores:
        raise ConditionError("no stored network can be run on these samples: " + "; ".join(left_out))
    networks = _networks(corpus, facts, request, scores)
    if by == "similarity" and all(network.similarity < 0 for network in networks):
        raise ConditionError(
            f"{corpus.location} does not say what its networks were trained for (its table of tasks has "
            f"{len(corpus.tasks)} rows); give labelled samples (data=FILE with x and y), or a corpus of "
            "`raywgen zoo train`"
        )
    order = {
        "loss": lambda one: (one.loss, -one.similarity),
        "accuracy": lambda one: (-one.accuracy, one.loss),
        "similarity": lambda one: (-one.similarity, -(one.test_accuracy or 0.0)),
    }
    networks.sort(key=order[by])
    return Retrieved(networks=networks[:top], by=by, num_tried=len(networks), left_out=left_out)


def _scores(
    corpus: Corpus, facts: pa.Table, request: TaskRequest, on_progress: Callable[[int, int, str], None] | None
) -> tuple[dict[str, tuple[float, float]], list[str]]:
    """Returns loss and accuracy on the labelled samples by checkpoint id, and why others could not be run."""
    scores: dict[str, tuple[float, float]] = {}
    left_out: list[str] = []
    if request.samples_SF is None or request.labels_S is None:
        return scores, left_out
    layout_ids = facts.column("layout_id").to_pylist()
    for layout_id in dict.fromkeys(layout_ids):
        rows = facts.take([row for row, other in enumerate(layout_ids) if other == layout_id])
        name, done = corpus.networks[layout_id].name, len(scores)

        def report(number: int, name: str = name, done: int = done) -> None:
            if on_progress is not None:
                on_progress(done + number, facts.num_rows, name)

        try:
            loss_N, accuracy_N = stored_scores(corpus, rows, request.samples_SF, request.labels_S, report)
        except MisfitError as error:
            left_out.append(str(error))
            continue
        pairs = zip(loss_N.tolist(), accuracy_N.tolist(), strict=True)
        scores |= dict(zip(rows.column("checkpoint_id").to_pylist(), pairs, strict=True))
    return scores, left_out


def _networks(
    corpus: Corpus, facts: pa.Table, request: TaskRequest, scores: dict[str, tuple[float, float]]
) -> list[Found]:
    """Returns all networks that were tried, with all that is known of them."""
    text_of, data_of = _similarities(corpus, request)
    names = ("checkpoint_id", "layout_id", "task_id", "test_accuracy")
    networks = []
    for name, layout_id, task_id, accuracy in zip(*(facts.column(key).to_pylist() for key in names), strict=True):
        if request.labels_S is not None and name not in scores:
            continue
        score = scores.get(name, (None, None))
        networks.append(
            Found(
                checkpoint_id=name,
                architecture=corpus.networks[layout_id].name,
                task_id=task_id,
                instruction=corpus.tasks[task_id].instruction if task_id in corpus.tasks else "",
                test_accuracy=accuracy if accuracy is not None and math.isfinite(accuracy) else None,
                loss=score[0],
                accuracy=score[1],
                text_similarity=text_of.get(task_id),
                data_similarity=data_of.get(task_id),
            )
        )
    return networks


def _similarities(corpus: Corpus, request: TaskRequest) -> tuple[dict[str | None, float], dict[str | None, float]]:
    """Returns, by task id, the similarity of the instruction and that of the samples."""
    tasks = list(corpus.tasks.values())
    text: dict[str | None, float] = {}
    if request.instruction and tasks:
        similarity_T = text_similarity(request.instruction, [task.instruction for task in tasks])
        text = dict(zip((task.task_id for task in tasks), similarity_T.tolist(), strict=True))
    samples_SF = request.samples_SF
    if samples_SF is None:
        return text, {}
    same_form = [task for task in tasks if task.samples_SF.shape[1] == samples_SF.shape[1]]
    data_T: list[float] = _data_similarity(samples_SF, [task.samples_SF for task in same_form])
    return text, dict(zip((task.task_id for task in same_form), data_T, strict=True))


def _data_similarity(samples_SF: Tensor, stored: list[Tensor]) -> list[float]:
    return data_similarity(samples_SF, stored).tolist() if stored else []
