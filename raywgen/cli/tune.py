"""The command `raywgen tune` searches over the settings of a pipeline."""

from __future__ import annotations

from raywgen.cli.early import check_named
from raywgen.cli.settings import Overrides, Shipped, Trust, out, split_config
from raywgen.config import ConfigError, load_config, shipped_config
from raywgen.progress import Reporter, plain


def tune(config: Shipped = None, overrides: Overrides = None, trust: Trust = None) -> None:
    """Search over any settings of a pipeline: a corpus, a generator, the judgement of its networks.

    raywgen tune igpg out=runs/tune

    raywgen tune lohp num_trials=32 'space.train.generator.policy.mix={uniform: [0, 1]}'

    raywgen tune zoo=digits train=mynets.flow:Flow 'space.train.generator.flow.optimizer.learning_rate={loguniform:
    [1.0e-4, 1.0e-2]}' out=runs/tune/flow

    CONFIG is a YAML file or a shipped search: `igpg`, `mcdi`, `lohp`. A generator of your own needs a search of your
    own, as in the third command. Keys of the pipeline begin with `zoo.` and `train.`: those of `space` are searched,
    those of `fixed` are set. The same command again continues an interrupted search; a larger `num_trials` extends a
    finished one.
    """
    path, rest = split_config(config, overrides)
    _check_method(path, rest)
    check_named("tune", shipped_config("tune", path), rest)

    from raywgen.tuning import TuneConfig
    from raywgen.tuning import tune as search
    from raywgen.tuning.live import final_rows, trials_table

    settings = load_config(TuneConfig, shipped_config("tune", path), rest)
    result = search(settings, Reporter())
    out.print(trials_table(final_rows(result.rows), result.num_rungs, out))
    folder = plain(settings.out)
    out.print(
        f"{len(result.rows)} trials, {result.total_steps:,} optimiser steps; best: trial {result.best.trial}\n"
        f"  train it:    raywgen train {folder}/best.yaml\n"
        f"  report:      {folder}/report.html\n"
        f"  TensorBoard: tensorboard --logdir {folder}/tensorboard",
        highlight=False,
        soft_wrap=True,
    )


def _check_method(name: str | None, overrides: list[str]) -> None:
    """Refuses a method in a place where a search takes none, and says how a search of that method is given.

    Raises:
        ConfigError: The method stands in place of the search, or as `method=`.
    """
    given = [override.removeprefix("method=") for override in overrides if override.startswith("method=")]
    if name is not None and ":" in name:
        given.append(name)
    if given:
        raise ConfigError(
            f"a search of {given[-1]} takes the method as `train` and names its own knobs: give "
            f"zoo=RECIPE train={given[-1]} 'space.train.generator.STAGE.optimizer.learning_rate="
            "{loguniform: [1.0e-4, 1.0e-2]}', or a YAML file with these keys"
        )
