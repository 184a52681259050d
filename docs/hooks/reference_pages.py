"""Writes the reference: a page of settings for each command and method, and one of all commands."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Collection, Iterator
from typing import Any

import typer

from raywgen.benchmarks.run import BENCHMARKS
from raywgen.cli import app
from raywgen.cli.settings import SCHEMAS
from raywgen.config_help import Setting, describe
from raywgen.generators import METHODS, method
from raywgen.tasks.networks.registry import NETWORKS

_FOLDER = "reference/configuration"
_OPTIONS = "| argument | meaning |\n|---|---|"


def reference_pages() -> dict[str, str]:
    """Returns the Markdown of every generated page by its place below `docs`."""
    pages = {f"{_FOLDER}/{page_of(path)}.md": _command_settings(path) for path in SCHEMAS}
    pages |= {f"{_FOLDER}/method-{name}.md": _method_settings(name) for name in METHODS}
    pages[f"{_FOLDER}/index.md"] = _index()
    pages["reference/command-line.md"] = _command_line()
    return pages


def with_lists(markdown: str, pages: Collection[str]) -> str:
    """Returns a page with what it asks for written into it.

    Args:
        markdown: The page. `{{ networks }}` becomes a table of the networks that recipes name, and `{{ benchmarks }}`
            one of the benchmarks of which no page shows a record.
        pages: Names of the benchmarks that have a page.
    """
    networks = [f"| `{name}` | {_first_line(build)} |" for name, build in NETWORKS.items()]
    modules = {name: importlib.import_module(place) for name, place in BENCHMARKS.items() if name not in pages}
    benchmarks = [f"| `{name}` | {_first_line(module)} |" for name, module in modules.items()]
    for place, head, rows in (("networks", "name", networks), ("benchmarks", "benchmark", benchmarks)):
        markdown = markdown.replace(f"{{{{ {place} }}}}", "\n".join([f"| {head} | what |", "|---|---|", *rows]))
    return markdown


def with_reference(nav: list[Any]) -> list[Any]:
    """Returns the site's table of contents with the pages of settings behind the one that lists them."""
    pages = [{path: f"{_FOLDER}/{page_of(path)}.md"} for path in SCHEMAS]
    pages += [{f"method={name}": f"{_FOLDER}/method-{name}.md"} for name in METHODS]

    def extended(entry: Any) -> Any:
        if isinstance(entry, dict):
            return {title: extended(content) for title, content in entry.items()}
        if isinstance(entry, list):
            own = pages if f"{_FOLDER}/index.md" in entry else []
            return [*map(extended, entry), *own]
        return entry

    return extended(nav)


def page_of(path: str) -> str:
    """Returns the name of the page of a command's settings, such as `zoo-train`."""
    return path.replace(" ", "-")


def _schema(path: str) -> type:
    module, _, name = SCHEMAS[path].partition(":")
    return getattr(importlib.import_module(module), name)


def _index() -> str:
    lines = ["# Configuration", "", _INDEX, "", "| command | its settings |", "|---|---|"]
    lines += [f"| `raywgen {path}` | [{path}]({page_of(path)}.md) |" for path in SCHEMAS]
    lines += ["", "| method | its settings |", "|---|---|"]
    lines += [f"| `method={name}` | [{name}](method-{name}.md) |" for name in METHODS]
    return "\n".join(lines) + "\n"


_INDEX = """Every command takes its settings as `key=value`, with dots for nested ones, after a YAML file or the name of
a shipped config. What stands later counts. A wrong key is refused before anything runs, and the nearest right one is
named. The tables below are written from the dataclasses that hold the settings."""


def _command_settings(path: str) -> str:
    schema = _schema(path)
    prefix = "cluster." if path == "cluster render" else ""
    text = f"# raywgen {path}\n\n{_first_line(schema)}\n\nSee [the command](../command-line.md#{_anchor(path)}).\n\n"
    if path == "train":
        links = ", ".join(f"[{name}](method-{name}.md)" for name in METHODS)
        text += f"The settings of a method stand below `generator.`: {links}.\n\n"
    return text + _tables(describe(schema, prefix), prefix)


def _method_settings(name: str) -> str:
    config = method(name).Config
    text = f"# method={name}\n\n{_first_line(config)}\n\nGive these to [`raywgen train`](train.md).\n\n"
    return text + _tables(describe(config, "generator."), "generator.")


def _first_line(described: object) -> str:
    return (inspect.getdoc(described) or "").partition("\n\n")[0].replace("\n", " ")


def _tables(settings: list[Setting], prefix: str) -> str:
    """Puts the settings of each group into a table of its own, those of no group first."""
    groups: dict[str, list[Setting]] = {}
    for setting in settings:
        groups.setdefault(setting.key.removeprefix(prefix).rpartition(".")[0], []).append(setting)
    parts = []
    for name in sorted(groups, key=lambda name: (name.count(".") if name else -1, list(groups).index(name))):
        heading = f"## `{prefix}{name}`\n\n" if name else ""
        rows = [f"| `{one.key}` | {_default(one.default)} | {_escaped(one.help)} |" for one in groups[name]]
        parts.append(heading + "| setting | default | meaning |\n|---|---|---|\n" + "\n".join(rows))
    return '<div class="settings" markdown>\n\n' + "\n\n".join(parts) + "\n\n</div>\n"


def _default(text: str) -> str:
    return f"`{_escaped(text)}`" if text else "empty"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _command_line() -> str:
    parts = ["# Command line", "", _COMMANDS, ""]
    for path, command in _commands(typer.main.get_command(app), ""):
        parts += [_command(path, command), ""]
    return "\n".join(parts)


_COMMANDS = (
    """This page is written from the commands' own help: `raywgen COMMAND --help` shows the same in a terminal."""
)


def _commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yields every command that does something, with its path, in the order of the help."""
    if hasattr(command, "commands"):
        for name, one in command.commands.items():
            if not one.hidden:
                yield from _commands(one, f"{path} {name}".strip())
    else:
        yield path, command


def _command(path: str, command: Any) -> str:
    context = command.make_context(path, [], resilient_parsing=True)
    context.info_name = f"raywgen {path}"
    usage = _plain_usage(" ".join(["raywgen", path, *command.collect_usage_pieces(context)]))
    text = f"## raywgen {path}\n\n```text\n{usage}\n```\n\n{_help(command.help or '')}\n"
    rows = [
        f"| {_names(one)} | {_escaped(' '.join(one.help.split()))} |"
        for one in command.params
        if getattr(one, "help", None) and not getattr(one, "hidden", False)
    ]
    if rows:
        text += "\n".join(["", _OPTIONS, *rows, ""])
    if path in SCHEMAS:
        text += f"\nSettings: [raywgen {path}](configuration/{page_of(path)}.md).\n"
    return text


def _plain_usage(usage: str) -> str:
    """Takes out brackets around brackets, which some versions of typer write around a metavar."""
    usage = re.sub(r"\[(\[[\w=]+\](?:\.\.\.)?)\](?:\.\.\.)?", r"\1", usage)
    return re.sub(r"\{(\w+)\}", r"\1", usage)


def _names(parameter: Any) -> str:
    names = parameter.opts if parameter.param_type_name == "option" else [parameter.metavar or parameter.name.upper()]
    return " ".join(f"`{_escaped(name)}`" for name in names)


def _help(text: str) -> str:
    """Puts paragraphs that are commands into blocks of code."""
    paragraphs: list[str] = []
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        shown = inspect.cleandoc(paragraph)
        if shown.startswith("raywgen "):
            block = f"```bash\n{shown}\n```"
            if paragraphs and paragraphs[-1].endswith("```"):
                block = paragraphs.pop().removesuffix("```") + block.removeprefix("```bash\n")
            paragraphs.append(block)
        else:
            paragraphs.append(paragraph)
    return "\n\n".join(paragraphs)


def _anchor(path: str) -> str:
    return f"raywgen-{page_of(path)}"
