"""Functions and argument types that commands share: overrides, tables."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from raywgen import __version__
from raywgen.cli.failures import is_one_line, line_of, print_aside
from raywgen.cli.help_page import SettingsCommand as SettingsCommand
from raywgen.cli.help_page import out as out
from raywgen.cli.known_settings import SCHEMAS as SCHEMAS
from raywgen.config import given_once
from raywgen.generators.method_names import METHOD_NAMES
from raywgen.progress import plain
from raywgen.trust import trusting

if TYPE_CHECKING:
    from raywgen.generation import NetworkRow

_OVERRIDES = "Settings, dots for nested ones; an unknown key names the nearest right one."
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help=_OVERRIDES)]
Config = Annotated[str | None, typer.Argument(metavar="CONFIG", help="A YAML file; without one, the defaults.")]
Shipped = Annotated[
    str | None,
    typer.Argument(metavar="CONFIG", help="A shipped config by its name, or a YAML file; else the defaults."),
]
TrainedBy = Annotated[
    str | None,
    typer.Argument(
        metavar="CONFIG",
        help=f"{', '.join(METHOD_NAMES)}, or `package.module:Class`; a shipped config such as `mcdi/heads`; or a "
        "YAML file.",
    ),
]


def _trust(context: typer.Context, names: list[str] | None) -> list[str] | None:
    """Trusts the names that the user gave while the command runs."""
    context.with_resource(trusting(*(names or [])))
    return names


Trust = Annotated[
    list[str] | None,
    typer.Option(
        "--trust",
        metavar="NAME",
        callback=_trust,
        is_eager=True,  # What it says counts for the arguments that are looked at after it.
        help="A package, address or folder that data may name, such as mynets, hf:NAME or s3://bucket; may be "
        "repeated.",
    ),
]


def versions() -> str:
    """Returns the versions that a report of a fault should name, in one line; nothing is imported for it."""
    shown = []
    for name in ("torch", "ray", "deepspeed"):
        try:
            shown.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            shown.append(f"no {name}")
    return f"raywgen {__version__} (Python {platform.python_version()}, {', '.join(shown)})"


def split_config(config: str | None, overrides: list[str] | None) -> tuple[str | None, list[str]]:
    """Separates the config from the overrides; a first argument with `=` is an override, not a file.

    Raises:
        ConfigError: An override is given twice with two values.
    """
    rest = list(overrides or [])
    if config is not None and "=" in config:
        return None, given_once([config, *rest])
    return config, given_once(rest)


def print_page(folder: str) -> None:
    """Draws the page on what a command left in its folder, and says where it lies, or why there is none.

    The command has done its work: an older file beside it that no page can be made of is no failure of it.
    """
    from raywgen.evaluation.report import write_report

    try:
        page = write_report(folder)
    except Exception as error:
        if not is_one_line(error):
            raise
        print_aside(f"no page: {plain(line_of(error))}")
    else:
        out.print(f"page: {plain(page)}", highlight=False, soft_wrap=True)


def print_info(info: Mapping[str, object]) -> None:
    """Prints counts as a table."""
    table = Table(show_header=False)
    for key, value in info.items():
        text = ", ".join(f"{name}: {count:,}" for name, count in value.items()) if isinstance(value, dict) else value
        table.add_row(plain(key), f"{text:,}" if isinstance(text, int) else plain(str(text)))
    out.print(table)


def print_networks(rows: list[NetworkRow], *, were_to_be_tried: bool = True) -> None:
    """Prints written networks as a table: one row each, or means if a task and architecture has several.

    For networks that were not tried it shows their log-probabilities instead of losses and accuracies.

    Args:
        rows: The networks.
        were_to_be_tried: Whether they would have been tried if that had been possible.
    """
    groups: dict[tuple[str, str], list[NetworkRow]] = {}
    for row in rows:
        groups.setdefault((row.network, row.task), []).append(row)
    several = len(groups) < len(rows)
    is_tried = any(row.example_loss is not None for row in rows)
    judged_by = ("task", "loss", "accuracy", "chance", "test accuracy")
    tasks = ("task",) if any(row.task for row in rows) else ()
    columns = judged_by if is_tried else (*tasks, "log-probability, nats")
    caption = "Balanced loss, and accuracy in percent, on the labelled samples." if is_tried else None
    table = Table("network", *columns, "networks" if several else "kept as", caption=caption, caption_justify="left")
    table.columns[0].no_wrap = True
    for (network, task), members in groups.items():
        path = Path(members[0].path)
        kept = (path.parent.name if path.name.endswith(".index.json") else path.name) or members[0].checkpoint_id
        last = f"{len(members):,}" if several else kept
        log_probs, losses, *shares = (
            [value for row in members if (value := getattr(row, name)) is not None]
            for name in ("log_prob", "example_loss", "example_accuracy", "chance", "test_accuracy")
        )
        on_examples, chance, test = ([100 * share for share in part] for part in shares)
        judged = (
            task,
            _mean(losses, 3, several),
            _mean(on_examples, 1, several),
            _mean(chance, 1, False),
            _mean(test, 1, several),
        )
        cells = judged if is_tried else (*([task] if tasks else []), _mean(log_probs, 1, several))
        table.add_row(plain(network), *map(plain, cells), plain(last))
    out.print(table)
    if not is_tried and not were_to_be_tried:
        out.print("Nothing was judged, as try_on_samples=false says.")
    elif not is_tried:
        out.print(
            "Nothing was judged: no task is known to try these networks on, or not how they are built. Say so by "
            "`raywgen corpus describe`, and train anew."
        )


def _mean(values: list[float], digits: int, several: bool) -> str:
    if not values:
        return "-"
    spread = f" ±{pstdev(values):.{digits}f}" if several else ""
    return f"{fmean(values):.{digits}f}{spread}"
