"""Finds out what a folder holds, and writes the page on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from raywgen.corpus.manifest import MANIFEST
from raywgen.evaluation.finetune import RESULT as FINETUNE
from raywgen.evaluation.report import evaluation_page, finetune_page, networks_page, training_page
from raywgen.evaluation.report.folder import CONFIG, Folder, opened
from raywgen.evaluation.report.inputs import ReportError
from raywgen.evaluation.report.rendering import write_page
from raywgen.evaluation.results import EVALUATION
from raywgen.evaluation.tokenizer_report import TOKENIZER
from raywgen.generation.file_sink import INDEX
from raywgen.locations import joined
from raywgen.storage import Storage
from raywgen.training.runlog import METRICS
from raywgen.training.stages_file import STAGES_FILE

REPORT = "report.html"
_PAGES: Mapping[str, tuple[str, Callable[[Folder], dict[str, object]]]] = {
    f"evaluation/{EVALUATION}": ("evaluation.html", evaluation_page.of_run),
    EVALUATION: ("evaluation.html", evaluation_page.of_evaluation),
    FINETUNE: ("finetune.html", finetune_page.content),
    INDEX: ("networks.html", networks_page.of_files),
    METRICS: ("training.html", training_page.content),
    MANIFEST: ("networks.html", networks_page.of_corpus),
}
"""The file that makes a folder what it is, the page's template, and the function that gives its content."""
_READ = (EVALUATION, FINETUNE, INDEX, METRICS, CONFIG, TOKENIZER, STAGES_FILE)


def write_report(location: str | Path) -> str:
    """Writes `report.html` into the folder of `raywgen demo`, `evaluate`, `train`, `finetune` or `generate`.

    A run folder whose evaluation lies below it, in `evaluation`, gets a page on both.

    Args:
        location: The folder, a local path or a URI.

    Returns:
        The page's path or URI.

    Raises:
        ReportError: The folder holds nothing to report, or a damaged file.
        StorageError: It cannot be read or written.
    """
    storage = Storage.at(location)
    kind = next((name for name in _PAGES if storage.size(name) is not None), None)
    if kind is None:
        raise ReportError(
            f"{location} holds nothing to report (none of {', '.join(_PAGES)}); give the `out` of `raywgen demo`, "
            "`evaluate`, `train`, `tune`, `finetune` or `generate`"
        )
    template, content = _PAGES[kind]
    with opened(location, *_READ) as folder:
        write_page(folder, REPORT, template, content(folder))
    return joined(location, REPORT)
