"""What mkdocs calls while it builds the site: generated pages, records of benchmarks, formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from example_page import example_page
from mathml import with_mathml
from mkdocs.structure.files import File, Files
from record_pages import RESULTS, with_records
from reference_pages import reference_pages, with_lists, with_reference

_ROOT = Path(__file__).parents[2]
# Files of the clone that are pages of the site, too.
_SHARED = {"CONTRIBUTING.md": "contributing/index.md", "CHANGELOG.md": "contributing/changelog.md"}


def on_config(config: Any) -> Any:
    """Adds the generated pages to the table of contents."""
    config["nav"] = with_reference(config["nav"])
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are written from the code, and those that the clone keeps at its top."""
    pages = (
        reference_pages() | {"examples.md": example_page()} | {place: _shared(name) for name, place in _SHARED.items()}
    )
    for place, text in pages.items():
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts records of benchmarks, and lists that the code gives, where a page asks for them."""
    return with_lists(with_records(markdown), [path.stem for path in RESULTS.glob("*.md")])


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Writes formulas as MathML; the page of a method shows code beside them at once."""
    if page.file.src_uri.startswith("methods/"):
        html = html.replace('<details class="mkdocstrings-source">', '<details class="mkdocstrings-source" open>')
    return with_mathml(html)


def on_post_page(output: str, **_: Any) -> str:
    """Gives the theme's search dialog a name, by which screen readers announce it."""
    return output.replace(
        'data-md-component="search" role="dialog"', 'data-md-component="search" role="dialog" aria-label="Search"'
    )


def _shared(name: str) -> str:
    """Returns a file of the clone, with its links into `docs` as seen from a folder below it."""
    return (_ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](../")
