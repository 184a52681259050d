"""Makes bundles out of checkpoints, tensor by tensor: nothing holds the whole of a generator."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from raywgen.generators import Generator
from raywgen.training.checkpoints import Checkpoint
from raywgen.weights.safetensors_stream import BLOCK_BYTES, StreamedTensor


def stored_tensors(stored: Checkpoint, generator: Generator) -> dict[str, StreamedTensor]:
    """Returns the tensors of a checkpoint's generator, which are read when they are written.

    Within a stage that keeps moving averages of its parameters, these stand in the place of the parameters.

    Args:
        stored: The checkpoint.
        generator: A generator of the run; its values do not matter.
    """
    stages, state = generator.stages(), stored.state
    averages: dict[int, str] = {}
    if state.stage < len(stages) and state.step:
        parameters = stages[state.stage].named_parameters()
        averages = {id(parameter): f"ema.{name}" for name, parameter in parameters if f"ema.{name}" in stored}
    return {
        name: _streamed(stored, averages.get(id(tensor), f"model.{name}"), tensor)
        for name, tensor in generator.state_dict(keep_vars=True).items()
    }


def _streamed(stored: Checkpoint, name: str, like: Tensor) -> StreamedTensor:
    num, step = math.prod(stored.index.tensors[name].shape), BLOCK_BYTES // like.dtype.itemsize

    def blocks() -> Iterator[Tensor]:
        for start in range(0, num, step):
            yield stored.read(name, start, min(start + step, num))

    return StreamedTensor(like.dtype, stored.index.tensors[name].shape, blocks)
