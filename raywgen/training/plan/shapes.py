"""The sizes of a generator's stages, found by running their steps without values.

Nothing of the size of the generator or of a network is held, so that a plan for any size takes seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raywgen.config import one_line
from raywgen.generators import Generator, Stage
from raywgen.generators.bundle import build_generator
from raywgen.nn.blocks import prepare_blocks
from raywgen.nn.precision import autocast, resolved
from raywgen.tasks import build_network
from raywgen.training.batch_plan import STAGE_STREAM, VALIDATION_BATCH, num_validation_parts
from raywgen.training.config import TrainConfig
from raywgen.training.live_bytes import LiveBytes
from raywgen.training.memory_check import network_bytes
from raywgen.training.plan.corpus import PlannedCorpus
from raywgen.training.plan.tokens import PlannedTokens, planned_tokens
from raywgen.training.plan.valueless import valueless
from raywgen.training.stage_setup import NUM_SETUP_BATCHES
from raywgen.training.strategy import StageSizes
from raywgen.weights import Condition, KeyedNoise, Layout, Normalizer, WeightBatch

_PAIR = (1, 3)


@dataclass(frozen=True, kw_only=True)
class StageShape:
    """The sizes of one stage.

    Attributes:
        name: Name of the stage.
        num_steps: Optimiser steps.
        sizes: What decides its strategy, with the activations of one network.
        whole_networks: Whether its steps run whole networks.
        num_values: Values of weights that a step reads, over all workers.
        num_tokens: Tokens that a step learns from; 0 where it knows no tokens.
        batch_bytes: Bytes of a network in a batch, with its condition and query.
        fixed_bytes: Bytes that a step takes whatever the number of networks.
        setup_bytes: Bytes that the preparation of the stage takes.
        validation: Fixed bytes that a validation takes, and those of each network that is validated at once; 0 where
            the corpus has no networks for it.
        guess: Why the step could not be run without values, so that it is estimated from below; empty where it could.
    """

    name: str
    num_steps: int
    sizes: StageSizes
    whole_networks: bool
    num_values: int
    num_tokens: int
    batch_bytes: int
    fixed_bytes: int
    setup_bytes: int = 0
    validation: tuple[int, int] = (0, 0)
    guess: str = ""

    def part_bytes(self, num_networks: int) -> int:
        """Returns the bytes that forward and backward pass of some networks take at their peak."""
        return self.fixed_bytes + num_networks * self.sizes.activation_bytes

    def validation_bytes(self, num_workers: int, accumulate: int) -> int:
        """Returns the bytes that a worker takes to validate, in parts no larger than those of a training step."""
        share = math.ceil(max(VALIDATION_BATCH, num_workers) / num_workers)
        fixed, each = self.validation
        return fixed + math.ceil(share / num_validation_parts(self.sizes.batch_size, num_workers, accumulate)) * each


@dataclass(frozen=True, kw_only=True)
class GeneratorShape:
    """The sizes of a generator.

    Attributes:
        num_parameters: Parameters of all of it.
        buffer_bytes: Bytes of its buffers, such as codebooks.
        stages: Its stages.
        tokens: The tokens of the largest network; None where it writes none.
    """

    num_parameters: int
    buffer_bytes: int
    stages: Sequence[StageShape]
    tokens: PlannedTokens | None = None


def generator_shape(config: TrainConfig, corpus: PlannedCorpus) -> GeneratorShape:
    """Returns the sizes of a run's generator and stages."""
    with valueless():
        generator = valueless_generator(config, corpus)
        layout, _ = generator.normalizers[corpus.largest.id]
        parameters = list(generator.parameters())
        return GeneratorShape(
            num_parameters=sum(parameter.numel() for parameter in parameters),
            buffer_bytes=sum(buffer.nbytes for buffer in generator.buffers()),
            stages=[_StageRuns(stage, generator, layout, config, corpus).shape() for stage in generator.stages()],
            tokens=planned_tokens(generator, layout),
        )


def valueless_generator(config: TrainConfig, corpus: PlannedCorpus) -> Generator:
    """Builds the generator of a run within `valueless`, with normalisers that have no values either."""
    table = {}
    for layout in corpus.layouts:
        own = Layout(layout.tensors)  # Some layouts keep tables, which hold no values here.
        count = len(own.generated)
        table[own.id] = (own, Normalizer(own, torch.zeros(count), torch.ones(count)))
    return build_generator(config.method, config.generator, table, corpus.data, config.seed)


class _StageRuns:
    """Runs what a trainer runs of one stage, without values."""

    def __init__(
        self, stage: Stage, generator: Generator, layout: Layout, config: TrainConfig, corpus: PlannedCorpus
    ) -> None:
        self._stage, self._layout, self._config, self._corpus = stage, layout, config, corpus
        self._num_targets = generator.needs.num_targets
        self._precision = resolved(config.precision, "cpu") if config.device != "cuda" else config.precision
        for parameter in stage.parameters():
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
        prepare_blocks(stage, recompute=config.activation_checkpointing, compiled=False)

    def shape(self) -> StageShape:
        """Returns the stage's sizes; where its steps depend on values, what it says of itself."""
        stage, batch_size = self._stage, self._stage.config.batch_size
        example = self._batch(1)
        guess, setup, validation = "", 0, (0, 0)
        try:
            setup = self._peak(lambda: stage.setup(self._setup_batches(), 0))
            self._evaluation(1)()  # Makes tables, which then are there.
            fixed, each = self._peaks(self._step)
            if self._corpus.is_validated:
                validation = self._peaks(self._evaluation)
        except Exception as error:  # Code of any method runs here, and may ask for what only values can tell.
            guess = one_line(error).partition(". ")[0] or type(error).__name__
            num_values = example.num_values if not stage.needs.whole_networks else self._layout.num_values
            fixed, each = 0, int(network_bytes(stage, num_values, self._config))
        sizes = StageSizes.of_states(stage, activation_bytes=each)
        return StageShape(
            name=stage.name,
            num_steps=stage.config.num_steps,
            sizes=sizes,
            whole_networks=stage.needs.whole_networks,
            num_values=batch_size * example.num_values,
            num_tokens=batch_size * stage.num_tokens(example),
            batch_bytes=_batch_bytes(example),
            fixed_bytes=fixed,
            setup_bytes=setup,
            validation=validation,
            guess=guess,
        )

    def _peaks(self, make: Callable[[int], Callable[[], object]]) -> tuple[int, int]:
        """Returns the fixed bytes of what is made for a number of networks, and those of each network."""
        small, large = (self._peak(make(num)) for num in _PAIR)
        each = max(0, large - small) // (_PAIR[1] - _PAIR[0])
        return max(0, small - _PAIR[0] * each), each

    def _peak(self, run: Callable[[], object]) -> int:
        with LiveBytes() as live:
            run()
        return live.peak

    def _step(self, num_networks: int) -> Callable[[], object]:
        batch, noise = self._batch(num_networks), self._noise(num_networks)

        def step() -> None:
            self._stage.train()
            with autocast(self._precision, "cpu"):
                result = self._stage(batch, noise)
            result.loss.backward()

        return step

    def _evaluation(self, num_networks: int) -> Callable[[], object]:
        batch, noise = self._batch(num_networks), self._noise(num_networks)

        @torch.no_grad()
        def evaluate() -> None:
            self._stage.eval()
            with autocast(self._precision, "cpu"):
                self._stage(batch, noise)

        return evaluate

    def _setup_batches(self) -> Iterator[WeightBatch]:
        for _ in range(NUM_SETUP_BATCHES):
            yield self._batch(self._stage.config.batch_size)

    def _noise(self, num_networks: int) -> KeyedNoise:
        return KeyedNoise(0, torch.arange(num_networks), STAGE_STREAM)

    def _batch(self, num_networks: int) -> WeightBatch:
        B, layout = num_networks, self._layout
        windows = self._stage.windows(layout, self._noise(B))
        length = layout.num_values if windows is None else windows.num_values
        recipe = self._corpus.recipes.get(layout.id)
        moments_BYK = None
        if windows is not None and windows.header is not None:
            moments_BYK = torch.zeros(*windows.header.index_BY.shape, windows.chunk_length)
        return WeightBatch(
            values_BD=torch.zeros(B, length),
            layout=layout,
            module=build_network(recipe) if recipe and windows is None else nn.Module(),
            condition=self._condition(B, self._num_shown()),
            query=self._condition(B, self._config.num_query_samples),
            sample_index_B=torch.arange(B),
            targets_BAD=torch.zeros(B, self._num_targets, length) if self._num_targets else None,
            windows=windows,
            moments_BYK=moments_BYK,
        )

    def _num_shown(self) -> int:
        return self._config.shot * self._corpus.data.max_classes or self._config.num_condition_samples

    def _condition(self, num_networks: int, num_samples: int) -> Condition:
        data = self._corpus.data
        return Condition(
            instructions=("Which class does the sample belong to?",) * num_networks,
            samples_BSF=torch.zeros(num_networks, num_samples, data.num_features),
            labels_BS=torch.zeros(num_networks, num_samples, dtype=torch.int64),
            policies=(data.policies[0],) * num_networks if data.policies else (),
        )


def _drop_gradient(parameter: Tensor) -> None:
    """Leaves the gradients out, which are counted with the states."""
    parameter.grad = None


def _batch_bytes(batch: WeightBatch) -> int:
    tensors = [batch.values_BD, batch.targets_BAD, batch.moments_BYK]
    for part in (batch.condition, batch.query):
        tensors += [part.samples_BSF, part.labels_BS]
    return math.ceil(sum(tensor.nbytes for tensor in tensors if tensor is not None) / len(batch))
