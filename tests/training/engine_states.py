"""All that an engine gives to a checkpoint, written and read again."""

from __future__ import annotations

import tempfile

from torch import Tensor, nn

from raywgen.training.checkpoints import CheckpointManager, TrainState
from raywgen.training.engine import Engine


class Held(dict[str, Tensor]):
    """The tensors of a checkpoint, in memory."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self[name].reshape(-1)[start:stop].clone()

    def under(self, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in self.items() if name.startswith(prefix)}


def state_of(engine: Engine, module: nn.Module | None = None) -> Held:
    """Saves the state of an engine of one worker, and loads all of it."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoints, state = CheckpointManager(folder), TrainState(step=1)
        checkpoints.save(state, engine.state(module or engine.stage))
        checkpoints.wait()
        stored = checkpoints.open(state.folder)
        return Held({name: stored.whole(name) for name in stored.index.tensors})


def parameters_of(engine: Engine) -> dict[str, Tensor]:
    return state_of(engine).under("model.")


def moments_of(engine: Engine) -> dict[str, Tensor]:
    return state_of(engine).under("optimizer.")


def averages_of(engine: Engine) -> dict[str, Tensor]:
    return state_of(engine).under("ema.")
