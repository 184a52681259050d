"""`raywgen tune`: parses, calls, prints."""

from __future__ import annotations

from raywgen.cli.settings import Config, Overrides, Trust, out, split_config
from raywgen.config import load_config, shipped_config
from raywgen.progress import Reporter


def tune(config: Config = None, overrides: Overrides = None, trust: Trust = None) -> None:
    """Search over any keys of a whole pipeline: prepare a corpus, train a generator, judge what it writes.

    raywgen tune igpg out=runs/tune

    raywgen tune lohp num_trials=32 'space.train.generator.policy.mix={uniform: [0, 1]}'

    CONFIG is a YAML file or a shipped search: `igpg`, `mcdi`, `lohp`. Keys of the pipeline begin with `zoo.` and
    `train.`: those of `space` are searched over, those of `fixed` set. The same command again goes on where the last
    one stopped; more `num_trials` go on beyond its end.
    """
    from raywgen.tuning import TuneConfig
    from raywgen.tuning import tune as search
    from raywgen.tuning.live import final_rows, trials_table

    path, rest = split_config(config, overrides)
    settings = load_config(TuneConfig, shipped_config("tune", path), rest)
    result = search(settings, Reporter())
    out.print(trials_table(final_rows(result.rows), result.num_rungs, out))
    out.print(
        f"{len(result.rows)} trials, {result.total_steps:,} optimiser steps; best: trial {result.best.trial}\n"
        f"  train it:    raywgen train {settings.out}/best.yaml\n"
        f"  report:      {settings.out}/report.html\n"
        f"  TensorBoard: tensorboard --logdir {settings.out}/tensorboard",
        highlight=False,
        soft_wrap=True,
    )
