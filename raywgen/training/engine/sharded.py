"""The engine of many workers: DeepSpeed ZeRO."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from raywgen.compat import (
    link_optimizer_state,
    moment_fragment,
    refresh_whole_parameters,
    release_engine,
    releasing_linear,
    remove_gathering_hooks,
    shard_of,
    skip_shared_memory_collectives,
    state_shards,
    whole_shape,
)
from raywgen.generators import Stage, StageLoss
from raywgen.nn.precision import resolved
from raywgen.training.checkpoints.slices import Part, Slice
from raywgen.training.engine.base import (
    MAX_BUCKET,
    Engine,
    EngineSettings,
)
from raywgen.training.engine.optimizer_state import MOMENTS, STEP, Stored, has_moments, load_range, new_optimizer
from raywgen.weights import KeyedNoise, WeightBatch


class DeepSpeedEngine(Engine):
    """Trains on all workers of a process group with DeepSpeed ZeRO 1 to 3.

    Args:
        stage: The stage to train.
        num_workers: Size of the process group, which is there already.
        settings: Settings of the engine.
    """

    def __init__(self, stage: Stage, num_workers: int, settings: EngineSettings | None = None) -> None:
        import deepspeed

        skip_shared_memory_collectives()
        super().__init__(stage, settings or EngineSettings())
        assert self.settings.zero_stage, "without shards, use ReplicatedEngine"
        self.rank, self.num_workers = torch.distributed.get_rank(), num_workers
        self._zero_stage = self.settings.zero_stage
        self._optimizer = new_optimizer(stage)
        accelerator: Any = deepspeed.get_accelerator()
        self._device = torch.device(accelerator.current_device_name())  # DeepSpeed moves the stage there.
        self._engine: Any = deepspeed.initialize(
            model=stage,
            optimizer=self._optimizer,  # pyright: ignore[reportArgumentType]
            dist_init_required=False,
            config=self._config(),
        )[0]
        self._gathers_all = self._zero_stage == 3 and stage.parameter_use != "modules"
        if self._gathers_all:
            remove_gathering_hooks(self._engine)
        self._start_averages()

    def _config(self) -> dict[str, Any]:
        settings, config = self.settings, self.stage.config
        # DeepSpeed allocates its buffers whole: by default 2 GB of them, also for a small stage.
        num_values = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in self.stage.parameters())
        # DeepSpeed wants an even size.
        bucket_size = min(num_values + num_values % 2, MAX_BUCKET)
        return {
            # Only counted: parts may be of any size, and the engine weights them itself.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": settings.accumulate,
            "gradient_clipping": config.optimizer.grad_clip,
            "zero_optimization": {
                "stage": settings.zero_stage,
                "stage3_param_persistence_threshold": settings.min_sharded,
                # With it, stages 1 and 2 sum the gradients of each worker's shard in an exchange of its own.
                "reduce_scatter": settings.zero_stage == 3,
                "reduce_bucket_size": bucket_size,
                "allgather_bucket_size": bucket_size,
                "memory_efficient_linear": False,
                **self._offload(),
            },
            "zero_allow_untested_optimizer": True,
            # Its own Adam for the CPU would have to be compiled on every node; torch's serves as well.
            "zero_force_ds_cpu_optimizer": False,
            "torch_autocast": {
                "enabled": resolved(settings.precision, self._device.type) == "bf16",
                "dtype": "bfloat16",
                # Gradients are exchanged in float32, so that any number of workers takes the same steps.
                "lower_precision_safe_modules": [],
            },
            "steps_per_print": 1_000_000_000,
        }

    def _offload(self) -> dict[str, Any]:
        kinds = {"none": [], "optimizer": ["optimizer"], "parameters": ["optimizer", "param"]}[self.settings.offload]
        where = {"device": "cpu", "pin_memory": self._device.type == "cuda"}
        return {f"offload_{kind}": where for kind in kinds}

    def close(self) -> None:
        """Removes DeepSpeed's hooks; without that, a stage that is over would keep its memory to the end of the run."""
        release_engine(self._engine)

    def _optimizer_state(self) -> dict[str, Part]:
        number = next(self._steps(), None)
        if number is None or not has_moments(self.stage):
            return {}  # There is none before the first step.
        found: dict[str, Part] = {STEP: number}
        for name, parameter in self.stage.named_parameters():
            for key in MOMENTS:
                if (part := self._moment(parameter, key)) is not None:
                    found[f"{name}|{key}"] = part
        return found

    def _moment(self, parameter: nn.Parameter, key: str) -> Part | None:
        """Returns this worker's part of a moment; None where it has none."""
        from deepspeed.utils import safe_get_local_optimizer_state

        if self._zero_stage == 3:
            moment = safe_get_local_optimizer_state(parameter, key)
            assert moment is not None, f"DeepSpeed keeps no {key} of a parameter"
            return self._part(moment, parameter)
        if (fragment := moment_fragment(parameter, key)) is None:
            return None
        return Slice(tuple(parameter.shape), *fragment)

    def _load_optimizer_state(self, stored: Stored) -> None:
        # Before its first step Adam has no state, and DeepSpeed no link from parameters to their shards of it.
        for shard in state_shards(self._engine):
            self._optimizer.state[shard] = {key: torch.zeros_like(shard) for key in MOMENTS}
            self._optimizer.state[shard][STEP] = torch.tensor(0.0)
        if self._zero_stage < 3:
            link_optimizer_state(self._engine)
        for name, parameter in self.stage.named_parameters():
            for key in MOMENTS:
                self._load_moment(parameter, key, stored, f"optimizer.{name}|{key}")
        for step in self._steps():
            step.copy_(stored.read(f"optimizer.{STEP}").view(()))

    def _load_moment(self, parameter: nn.Parameter, key: str, stored: Stored, name: str) -> None:
        from deepspeed.utils import safe_set_local_optimizer_state

        if self._zero_stage == 3:
            # DeepSpeed's own setter of whole values fails on the last worker where shards are padded.
            moment = torch.empty_like(self._held(parameter))
            load_range(moment, stored, name, self._range(parameter))
            safe_set_local_optimizer_state(parameter, moment, key)
        elif (fragment := moment_fragment(parameter, key)) is not None:
            start, values = fragment
            load_range(values, stored, name, (start, start + values.numel()))

    def _steps(self) -> Iterator[Tensor]:
        for state in self._optimizer.state.values():
            if STEP in state:
                yield state[STEP]

    # A worker holds the values [rank * n, (rank + 1) * n) of each parameter that ZeRO-3 shards, the last ones padded.

    def _held(self, parameter: Tensor) -> Tensor:
        shard = shard_of(parameter)
        return parameter if shard is None else shard

    def _part(self, held: Tensor, parameter: Tensor) -> Part:
        if shard_of(parameter) is None:
            return held
        start, stop = self._range(parameter)
        return Slice(whole_shape(parameter), start, held.detach().view(-1)[: stop - start])

    def _range(self, parameter: Tensor) -> tuple[int, int]:
        shard, num = shard_of(parameter), math.prod(whole_shape(parameter))
        if shard is None:
            return 0, num
        return min(self.rank * shard.numel(), num), min((self.rank + 1) * shard.numel(), num)

    def _load_held(self, parts: Mapping[str, Tensor]) -> None:
        super()._load_held(parts)
        refresh_whole_parameters(self._engine)

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        """Parameters are gathered within this block: all at once where a stage cannot have it module by module."""
        import deepspeed

        if self._gathers_all:
            with deepspeed.zero.GatheredParameters(list(self.stage.parameters())):
                yield
        elif self._zero_stage == 3:
            with releasing_linear():
                yield
        else:
            yield

    def _forward(self, batch: WeightBatch, noise: KeyedNoise) -> StageLoss:
        return self._engine(batch, noise)

    def _backward(self, loss: Tensor, share: float, *, is_first: bool) -> None:
        if not is_first:
            self._engine.step()  # It only counts the parts until the last one.
        # DeepSpeed divides each part's loss by their number.
        scale = share * self.settings.accumulate
        self._engine.backward(loss if scale == 1 else loss * scale)

    def _step(self, learning_rate: float) -> None:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
