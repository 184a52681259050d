"""Makes a bundle out of a checkpoint of a run, tensor by tensor, on a machine that need not hold the generator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from raywgen.config import ConfigError
from raywgen.corpus import Corpus
from raywgen.generators import Generator
from raywgen.generators.bundle import save_bundle
from raywgen.locations import joined
from raywgen.out_folder import checked_out
from raywgen.training.checkpoints import Checkpoint, CheckpointError, CheckpointManager, check_fits
from raywgen.training.config import read_train_config
from raywgen.training.export import stored_tensors
from raywgen.training.launcher import run_specs
from raywgen.training.rows import data_digest
from raywgen.training.run_folder import CONFIG, EXPORTS, check_is_run, warn


@dataclass(kw_only=True)
class ExportConfig:
    """Names the generator to export, and its folder.

    Attributes:
        out: Folder of the bundle; `exports/CHECKPOINT` in the run folder by default.
        stage: Name of a stage: the newest checkpoint in it or at its end is taken, and not the newest of all.
        checkpoint: Name of a checkpoint, a folder in `checkpoints/` of the run folder.
    """

    out: str = ""
    stage: str = ""
    checkpoint: str = ""

    def __post_init__(self) -> None:
        if self.stage and self.checkpoint:
            raise ValueError("give stage or checkpoint, not both")


def export_run(run: str, settings: ExportConfig) -> str:
    """Writes the bundle of a run's checkpoint, with the averages of the parameters where the stage keeps some.

    It reads one tensor after another and needs neither a GPU nor memory for the generator. The corpus must be there, as
    the normalisers of a bundle come from its manifest.

    Args:
        run: The run folder, a path or a URI.
        settings: What is exported, and where to.

    Returns:
        The folder of the bundle.

    Raises:
        OutError: Nothing can or should be written to the folder of the bundle.
        ConfigError: The folder holds no run, the stage is unknown, or the corpus holds other checkpoints now.
        CheckpointError: There is no checkpoint, or the named one is damaged.
        CorpusError: The corpus cannot be read.
    """
    out = checked_out(settings.out, "generators/mine") if settings.out else ""
    check_is_run(run)
    config = replace(read_train_config(joined(run, CONFIG)), out=run)
    corpus = Corpus.open(config.corpus)
    (spec,) = run_specs([config], corpus)
    generator = spec.skeleton()
    stored = _checkpoint(run, settings, generator)
    if stored.state.corpus != data_digest(corpus):
        raise ConfigError(f"{config.corpus} holds other checkpoints than {run} was trained on; restore the corpus")
    folder = out or joined(run, f"{EXPORTS}/{stored.state.folder}")
    save_bundle(
        generator, folder, spec.metadata | {"checkpoint": stored.state.folder}, stored_tensors(stored, generator)
    )
    return folder


def _checkpoint(run: str, settings: ExportConfig, generator: Generator) -> Checkpoint:
    names, checkpoints = [stage.name for stage in generator.stages()], CheckpointManager(run)
    if settings.stage and settings.stage not in names:
        raise ConfigError(f"stage={settings.stage}: {run} has the stages {', '.join(names)}")
    if settings.checkpoint:
        found = checkpoints.open(settings.checkpoint)
        check_fits(found.index, generator)
        found.verify(range(len(found.index.parts)))
        return found

    def check(found: Checkpoint) -> None:
        check_fits(found.index, generator)

    wanted = _positions(names.index(settings.stage)) if settings.stage else None
    stored, passed_over = checkpoints.newest(check, among=wanted)
    for sentence in passed_over:
        warn(sentence)
    if stored is None:
        of_stage = f" of stage '{settings.stage}'" if settings.stage else ""
        raise CheckpointError(f"{run} holds no checkpoint{of_stage} that can be used; train it first")
    return stored


def _positions(stage: int) -> Callable[[int, int], bool]:
    """Returns whether a checkpoint lies in a stage or at its end."""
    return lambda found, step: (found == stage and step > 0) or (found == stage + 1 and step == 0)
