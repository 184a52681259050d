"""Refuses a checkpoint whose position, names or shapes are not those of a run; no value is read for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from raywgen.generators import Generator, Stage
from raywgen.training.checkpoints.errors import CheckpointError
from raywgen.training.checkpoints.index import CheckpointIndex

Shapes = Mapping[str, Sequence[int]]


def check_fits(index: CheckpointIndex, generator: Generator) -> None:
    """Refuses a checkpoint of another generator.

    Args:
        index: The index of the checkpoint.
        generator: A generator of the run; its values do not matter.

    Raises:
        CheckpointError: Stage, step, names or shapes are not those of the generator's run.
    """
    stages, stage, step = generator.stages(), index.state.stage, index.state.step
    if not 0 <= stage <= len(stages) or not 0 <= step <= ([*_num_steps(stages), 0][stage]):
        raise CheckpointError(f"it stands at step {step} of stage {stage}, which this run does not have")
    if (stage, step) == (0, 0):
        return
    _compare(index.shapes("model."), _shapes(generator.state_dict()), "generator")
    if not step:
        return
    parameters, optimizer = _shapes(dict(stages[stage].named_parameters())), stages[stage].config.optimizer
    if optimizer.kind == "adamw":
        moments = {f"{name}|{key}": shape for name, shape in parameters.items() for key in ("exp_avg", "exp_avg_sq")}
        found = index.shapes("optimizer.")
        found.pop("step", None)
        _compare(found, moments, "optimiser")
    if optimizer.ema_decay:
        _compare(index.shapes("ema."), parameters, "average")


def _num_steps(stages: Sequence[Stage]) -> list[int]:
    return [stage.config.num_steps for stage in stages]


def _shapes(tensors: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(getattr(tensor, "shape", ())) for name, tensor in tensors.items()}


def _compare(found: Shapes, wanted: Shapes, what: str) -> None:
    if strange := sorted(found.keys() ^ wanted.keys()):
        raise CheckpointError(f"'{strange[0]}' is in the checkpoint or in the {what} alone")
    for name, shape in wanted.items():
        if tuple(found[name]) != tuple(shape):
            raise CheckpointError(f"'{name}' has the shape {tuple(found[name])}, in the {what} {tuple(shape)}")
