"""Renders pages: one style, one frame, and a small template for each kind."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from raywgen.evaluation.report.folder import CONFIG, Folder

PACKAGE = "raywgen.evaluation.report"
"""The package whose templates all pages extend."""


def write_page(folder: Folder, name: str, template: str, content: Mapping[str, object], package: str = PACKAGE) -> None:
    """Writes a page into its folder.

    Args:
        folder: The folder that the page is about.
        name: The page's file name.
        template: Name of the template, which extends `base.html`.
        content: Values of the template's variables.
        package: The package whose folder `templates` holds the template.
    """
    loaders = [PackageLoader(each, "templates") for each in dict.fromkeys((package, PACKAGE))]
    environment = Environment(
        loader=ChoiceLoader(loaders),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"percent": _percent, "integer": _integer, "short": _short}
    html = environment.get_template(template).render(
        run=folder.name, written=datetime.now().astimezone(), config=folder.text(CONFIG), **content
    )
    folder.storage.write(name, html.encode())


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _integer(number: float) -> str:
    return f"{number:,.0f}"


def _short(number: float) -> str:
    return f"{number:.4g}"
