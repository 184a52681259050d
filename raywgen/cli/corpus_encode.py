"""The command `raywgen corpus encode` makes tokens of a corpus by a trained tokeniser."""

from __future__ import annotations

from typing import Annotated

import typer

from raywgen.cli.corpus import app
from raywgen.cli.early import check_named
from raywgen.cli.settings import Overrides, SettingsCommand, Trust, print_info
from raywgen.config import given_once, load_config
from raywgen.progress import Reporter


@app.command(cls=SettingsCommand)
def encode(
    path: Annotated[str, typer.Argument(metavar="CORPUS", help="A corpus: local path or URI.")],
    overrides: Overrides = None,
    trust: Trust = None,
) -> None:
    """Encode a corpus once by the trained tokeniser of a run, over all cores and nodes, so that its prior need not.

    raywgen corpus encode runs/zoo/corpus tokenizer=runs/igpg out=runs/tokens

    The tokens serve the run that the tokeniser is of, by `generator.prior.tokens=runs/tokens`. If it was interrupted,
    run it again to continue; readers never see half of the tokens.
    """
    given = given_once([f"corpus={path}", *(overrides or [])])
    check_named("corpus encode", None, given)

    from raywgen.training.encode_corpus import EncodeConfig, encode_corpus
    from raywgen.training.session import ray_session

    config = load_config(EncodeConfig, None, given)
    with Reporter().step("encode", f"{path} into {config.out}") as bar:

        def on_progress(done: int, total: int) -> None:
            bar.amount(done, total, "values")

        tokens = encode_corpus(config, on_progress, bar.say, session=ray_session)
    print_info(tokens.corpus.info())
