"""Finds out what a folder holds, and writes the page on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from raywgen.corpus.manifest import MANIFEST
from raywgen.evaluation.finetune import RESULT as FINETUNE
from raywgen.evaluation.report import evaluation_page, finetune_page, networks_page, training_page
from raywgen.evaluation.report.folder import CONFIG, Folder, opened
from raywgen.evaluation.report.inputs import ReportError
from raywgen.evaluation.report.rendering import PACKAGE, write_page
from raywgen.evaluation.results import EVALUATION
from raywgen.evaluation.tokenizer_report import TOKENIZER
from raywgen.generation.file_sink import INDEX
from raywgen.locations import joined
from raywgen.storage import Storage
from raywgen.training.runlog import METRICS
from raywgen.training.stages_file import STAGES_FILE

REPORT = "report.html"
_READ = (EVALUATION, FINETUNE, INDEX, METRICS, CONFIG, TOKENIZER, STAGES_FILE)


class Page(NamedTuple):
    """The parts that a page on a folder is made of.

    Attributes:
        template: Its template.
        content: Returns the values of the template's variables.
        package: The package whose folder `templates` holds the template.
        reads: Names of the files that it is made of.
    """

    template: str
    content: Callable[[Folder], dict[str, object]]
    package: str = PACKAGE
    reads: tuple[str, ...] = _READ


PAGES: Mapping[str, Page] = {
    f"evaluation/{EVALUATION}": Page("evaluation.html", evaluation_page.of_run),
    EVALUATION: Page("evaluation.html", evaluation_page.of_evaluation),
    FINETUNE: Page("finetune.html", finetune_page.content),
    INDEX: Page("networks.html", networks_page.of_files),
    METRICS: Page("training.html", training_page.content),
    MANIFEST: Page("networks.html", networks_page.of_corpus),
}
"""The page on a folder, by the file that makes the folder what it is."""


def write_report(location: str | Path, pages: Mapping[str, Page] = PAGES) -> str:
    """Writes `report.html` into the folder of `raywgen demo`, `evaluate`, `train`, `finetune` or `generate`.

    A run folder whose evaluation lies below it, in `evaluation`, gets a page on both.

    Args:
        location: The folder, a local path or a URI.
        pages: The pages that there are, by the file that makes a folder what it is; the first that is found counts.

    Returns:
        The page's path or URI.

    Raises:
        ReportError: The folder holds nothing to report, or a damaged file.
        StorageError: It cannot be read or written.
    """
    storage = Storage.at(location)
    page = next((page for name, page in pages.items() if storage.size(name) is not None), None)
    if page is None:
        raise ReportError(
            f"{location} holds nothing to report (none of {', '.join(pages)}); give the `out` of `raywgen demo`, "
            "`evaluate`, `train`, `tune`, `finetune` or `generate`"
        )
    with opened(location, *page.reads) as folder:
        write_page(folder, REPORT, page.template, page.content(folder), page.package)
    return joined(location, REPORT)
