"""Help of commands that take settings: the main ones on a page that fits a screen, all of them by `--help-all`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.text import Text
from typer.core import TyperCommand

from raywgen.cli.known_settings import settings_of_command, settings_of_method
from raywgen.config import config_file, read_yaml
from raywgen.config_help import Setting
from raywgen.generators.method_names import METHOD_NAMES, is_import_path

ALL = "--help-all"
MAIN = {
    "demo": ("out", "seed", "zoo.num_seen_tasks", "zoo.num_unseen_tasks"),
    "zoo train": (
        "tasks.kind",
        "tasks.path",
        "networks",
        "num_seen_tasks",
        "num_unseen_tasks",
        "seeds_per_task",
        "start",
        "num_steps",
        "checkpoint_steps",
        "out",
        "seed",
    ),
    "encoder train": ("path", "out", "width", "way", "shot", "num_episodes", "learning_rate", "seed"),
    "train": ("corpus", "out", "num_workers", "device", "shot", "seed"),
    "plan": ("layout", "nodes", "cpus", "gpus_per_node", "gpu_memory", "memory", "measure", "seconds_per_step"),
    "generate": ("generator", "corpus", "tasks", "networks", "instruction", "data", "out", "best_of", "device"),
    "statistics": ("data", "network", "num", "mean", "std", "out"),
    "select": ("data", "instruction", "task", "networks", "generator", "by", "out"),
    "finetune": ("start", "generator", "corpus", "tasks", "network", "epochs", "learning_rates", "out", "seed"),
    "cluster render": (
        "cluster.cpus",
        "cluster.memory",
        "cluster.max_nodes",
        "cluster.gpus",
        "cluster.max_gpu_nodes",
        "cluster.mount",
        "cluster.code",
    ),
    "tune": ("zoo", "corpus", "train", "space", "fixed", "scheduler", "num_trials", "out"),
}
"""The settings on the page of a command that has more of them than fit."""
_OF_A_STAGE = ("num_steps", "batch_size", "optimizer.learning_rate")
_OF_A_METHOD = re.compile(r"generator\.(network\.(kind|width)|width)")
_GIVEN, _IS_LONG = "raywgen.given", "raywgen.is_long"
_MOST_OF_DEFAULT = 18
# On a narrower terminal what a setting means stands on a line of its own.
_LEAST_OF_MEANING, _INDENT = 30, " " * 7

out = Console(emoji=False)


class SettingsCommand(TyperCommand):
    """A command that takes settings as `key=value`, and lists them in its help."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Keeps the arguments for `format_help`, which runs before they are parsed."""
        own = args[: args.index("--")] if "--" in args else args
        ctx.meta[_GIVEN], ctx.meta[_IS_LONG] = list(own), ALL in own
        return super().parse_args(ctx, ["--help"] if ALL in own else args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Prints the usual help, of which the short page leaves out all after the examples, and then the settings."""
        path, given, is_long = ctx.command_path.partition(" ")[2], ctx.meta.get(_GIVEN, []), ctx.meta.get(_IS_LONG)
        whole = self.help
        if not is_long:
            self.help = shortened(self.help or "")
        try:
            super().format_help(ctx, formatter)
        finally:
            self.help = whole
        known, methods = settings_of_command(path), methods_of(given) if path == "train" else []
        of_method = [setting for name in methods for setting in method_settings(name)]
        if is_long:
            _print_all([*known, *of_method])
        else:
            _print_main(path, known, methods, of_method)


def shortened(text: str) -> str:
    """Returns a help text up to its last example, or its first paragraph where it has none."""
    parts = text.split("\n\n")
    last = max((place for place, part in enumerate(parts) if part.startswith("raywgen ")), default=0)
    return "\n\n".join(parts[: last + 1])


def methods_of(given: Sequence[str]) -> list[str]:
    """Returns the method that the arguments of `raywgen train` name, if they name one.

    Raises:
        ConfigError: They name a YAML file that cannot be read.
    """
    for argument in given:
        name = argument.removeprefix("method=")
        if name in METHOD_NAMES or is_import_path(name):
            return [name]
        path = None if "=" in argument else config_file(name)
        if path is not None:
            return [str(read_yaml(path).get("method", METHOD_NAMES[0]))]
    return []


def method_settings(name: str) -> list[Setting]:
    """Returns the settings of a method, which is imported where it is one of the user's own.

    Raises:
        UnknownMethodError: There is no such method.
    """
    if name in METHOD_NAMES:
        return settings_of_method(name)
    # Imported late: torch takes seconds.
    from raywgen.config_help import describe
    from raywgen.generators import method
    from raywgen.trust import named_in, trusting

    with trusting(*named_in(name)):
        return describe(method(name).Config, "generator.")


def _print_main(path: str, known: list[Setting], methods: list[str], of_method: list[Setting]) -> None:
    shown = [setting for setting in known if setting.key in MAIN[path]] if path in MAIN else known
    rows = [*shown, *(setting for setting in of_method if _is_main(setting.key, of_method))]
    total = len(known) + len(of_method)
    out.print(Text(f" Settings, given as key=value ({len(rows)} of {total}):", style="bold"))
    names = max(len(setting.key) for setting in rows)
    defaults = min(_MOST_OF_DEFAULT, max(len(setting.default) for setting in rows))
    for setting in rows:
        default, first = _cut(setting.default, defaults), re.split(r"(?<=\.) ", setting.help)[0]
        begin = f"   {setting.key:<{names}}  {default:<{defaults}}  "
        if out.width - len(begin) < _LEAST_OF_MEANING:
            out.print(Text(begin), soft_wrap=True, highlight=False)
            begin = _INDENT
        out.print(Text(begin + _cut(first, max(1, out.width - len(begin)))), soft_wrap=True, highlight=False)
    if path == "train" and not methods:
        out.print(
            Text(f" Each method has settings of its own: raywgen train METHOD --help ({', '.join(METHOD_NAMES)}).")
        )
    out.print(Text(f" {ALL} lists all settings, with all that is to say about them and about the command."))


def _is_main(key: str, settings: list[Setting]) -> bool:
    """Whether a method's setting is the length, the batch or the rate of a stage, or the size of its network."""
    stages = {one.key.removesuffix(f".{_OF_A_STAGE[-1]}") for one in settings if one.key.endswith(_OF_A_STAGE[-1])}
    return any(key == f"{stage}.{name}" for stage in stages for name in _OF_A_STAGE) or bool(
        _OF_A_METHOD.fullmatch(key)
    )


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1].rstrip()}…"


def _print_all(settings: list[Setting]) -> None:
    out.print(Text(f" All {len(settings)} settings, given as key=value:", style="bold"))
    for setting in settings:
        out.print(Text(f" {setting.key}={setting.default}"), soft_wrap=True, highlight=False)
        out.print(Padding(Text(setting.help), (0, 1, 0, 5)))
