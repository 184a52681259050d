"""The commands `raywgen encoder ...` train frozen encoders that turn samples into features."""

from __future__ import annotations

import typer

from raywgen.cli.settings import Overrides, SettingsCommand, Shipped, out, split_config
from raywgen.config import load_config, shipped_config
from raywgen.progress import Reporter, plain

app = typer.Typer(no_args_is_help=True, help="Train frozen encoders that turn the samples of tasks into features.")


@app.callback()
def group() -> None:
    """Keeps `train` a command of its own, though it is the only one."""


@app.command(cls=SettingsCommand)
def train(config: Shipped = None, overrides: Overrides = None) -> None:
    """Train an encoder, for instance `raywgen encoder train omniglot out=runs/encoders/mine`.

    CONFIG is a YAML file or a shipped one: `omniglot`. It is trained on the training classes of episodes only, never on
    those of validation or test. A finished encoder with the same settings is reused.
    """
    from raywgen.tasks.encoder_training import EncoderConfig, train_encoder

    path, rest = split_config(config, overrides)
    settings = load_config(EncoderConfig, shipped_config("encoder", path), rest)
    with Reporter().step("encoder", f"train into {settings.out}") as bar:
        card = train_encoder(settings, bar.named)
    accuracy, seconds = card.facts["validation_accuracy"], card.facts["seconds"]
    out.print(f"5-way 1-shot accuracy on validation classes: {100 * accuracy:.1f}, trained in {seconds:.0f} s")
    out.print(
        f"{plain(settings.out)} holds the encoder; give it to a zoo as tasks.encoder", highlight=False, soft_wrap=True
    )
