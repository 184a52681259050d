"""The commands `raywgen cluster ...` write manifests and launcher files that fit a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from raywgen.cli.settings import Overrides, SettingsCommand, TrainedBy, out, split_config
from raywgen.out_folder import local_out
from raywgen.progress import plain

app = typer.Typer(no_args_is_help=True, help="Describe a Ray cluster that fits a run.")


@app.callback()
def group() -> None:
    """Keeps `render` a command of its own, though it is the only one."""


@app.command(cls=SettingsCommand)
def render(
    config: TrainedBy = None,
    overrides: Overrides = None,
    into: Annotated[str, typer.Option(help="Folder that the files are written into.")] = "rendered",
) -> None:
    """Write KubeRay manifests and launcher files for a run: enough nodes for its workers, one Ray version everywhere.

    raywgen cluster render configs/igpg/digits.yaml num_workers=32 cluster.cpus=16 cluster.max_nodes=4

    CONFIG and `key=value` are the run's, as for `raywgen train`; `cluster.key=value` are those listed below.
    """
    from raywgen.cluster.preflight import train_config
    from raywgen.cluster.render import render as fill
    from raywgen.cluster.settings import RenderConfig
    from raywgen.config import load_config

    path, rest = split_config(config, overrides)
    settings = load_config(RenderConfig, None, [key[8:] for key in rest if key.startswith("cluster.")])
    run = [key for key in rest if not key.startswith("cluster.")]
    local_out(into, "rendered", "raywgen cluster render", "--into")
    files = fill(train_config([path, *run] if path else run, "."), settings, path, run)
    Path(into).mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (Path(into) / name).write_text(text)
        out.print(f"{plain(into)}/{name}", highlight=False, soft_wrap=True)
