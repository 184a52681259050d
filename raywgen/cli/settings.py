"""Functions and argument types that commands share: settings in `--help`, tables, overrides."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperCommand

from raywgen.config import given_once, shipped_config, shipped_configs
from raywgen.config_help import describe
from raywgen.progress import plain
from raywgen.trust import named_in, trusting

if TYPE_CHECKING:
    from raywgen.generation import NetworkRow

out = Console(emoji=False)
SCHEMAS = {
    "export": "raywgen.training.export_run:ExportConfig",
    "demo": "raywgen.benchmarks.demo:DemoConfig",
    "zoo train": "raywgen.zoo:ZooConfig",
    "corpus encode": "raywgen.training.encode_corpus:EncodeConfig",
    "encoder train": "raywgen.tasks.encoder_training:EncoderConfig",
    "train": "raywgen.training:TrainConfig",
    "plan": "raywgen.training.plan:PlanConfig",
    "generate": "raywgen.generation:GenerateConfig",
    "adapt": "raywgen.generation:AdaptConfig",
    "statistics": "raywgen.generation.file_statistics:StatisticsConfig",
    "evaluate": "raywgen.evaluation.config:EvaluateConfig",
    "retrieve": "raywgen.evaluation.retrieve:RetrieveConfig",
    "select": "raywgen.evaluation.select:SelectConfig",
    "finetune": "raywgen.evaluation.finetune:FinetuneConfig",
    "cluster render": "raywgen.cluster.settings:RenderConfig",
    "tune": "raywgen.tuning:TuneConfig",
}
_GIVEN = "raywgen.given"
_OVERRIDES = "Settings as `key=value`, dots for nested ones; an unknown key names the nearest right one."
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help=_OVERRIDES)]
Config = Annotated[str | None, typer.Argument(metavar="[CONFIG]", help="A YAML file; without one, the defaults.")]


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
        help="A package, address or folder that a corpus or generator may name, such as mynets, hf:NAME or "
        "s3://bucket; may be repeated. What your own settings name needs none.",
    ),
]


class SettingsCommand(TyperCommand):
    """A command whose help lists all its settings; their class is imported only when help is printed."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Keeps the arguments for `format_help`, which runs before they are parsed."""
        ctx.meta[_GIVEN] = list(args)
        return super().parse_args(ctx, args)

    def format_help(self, ctx: typer.Context, formatter: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Appends the settings to the usual help."""
        super().format_help(ctx, formatter)
        module, _, name = SCHEMAS[ctx.command_path.partition(" ")[2]].partition(":")
        schema = getattr(importlib.import_module(module), name)
        prefix = "cluster." if name == "RenderConfig" else ""
        _print_settings(schema, "Settings, given as key=value", prefix)
        if name == "TrainConfig":
            from raywgen.generators import METHODS, is_import_path, method

            given = [argument.removeprefix("method=") for argument in ctx.meta.get(_GIVEN, [])]
            own = [name for name in given if is_import_path(name)]
            with trusting(*named_in(own)):
                for name in own or METHODS:
                    _print_settings(method(name).Config, f"method={name}", "generator.")


def _print_settings(schema: type, title: str, prefix: str = "") -> None:
    table = Table("setting", "default", "meaning", title=title, title_justify="left")
    for setting in describe(schema, prefix):
        table.add_row(setting.key, setting.default, setting.help)
    out.print(table)


def split_config(config: str | None, overrides: list[str] | None) -> tuple[str | None, list[str]]:
    """Separates the config from the overrides; a first argument with `=` is an override, not a file.

    Raises:
        ConfigError: An override is given twice with two values.
    """
    rest = list(overrides or [])
    if config is not None and "=" in config:
        return None, given_once([config, *rest])
    return config, given_once(rest)


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


def zoo_recipes() -> list[Path]:
    """Returns the files of the shipped zoo recipes."""
    return shipped_configs("zoo")


def shipped_zoo(config: str | None) -> str | None:
    """Returns the file of a shipped recipe's name; anything else stays as it is."""
    return shipped_config("zoo", config)
