"""The stages that train a generator: one interface for all methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from torch import Tensor, nn

from raywgen.generators.settings import StageConfig
from raywgen.nn.quantisers import AllReduce
from raywgen.weights import KeyedNoise, Layout, WeightBatch, Windows

ParameterUse = Literal["modules", "whole", "functional"]
"""How a stage's forward reads its parameters: by calling `modules`, in an order that the layout alone decides; any of
them at any time (`whole`), as where networks are generated; or as tensors that it changes copies of (`functional`)."""


class StageLoss(NamedTuple):
    """A scalar to minimise, and detached scalars for logging.

    A tuple, because DeepSpeed finds the tensors that a module's forward returns in tuples, lists and dicts only.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageNeeds:
    """The needs of a stage: what its batches must hold.

    Attributes:
        tasks: Whether batches must hold samples of tasks and modules to run, beside weights.
        num_targets: Number of local targets of each trajectory; 0 takes every checkpoint by itself.
        whole_networks: Whether batches must hold all values of each network, not windows alone.
    """

    tasks: bool = True
    num_targets: int = 0
    whole_networks: bool = True

    def __or__(self, other: StageNeeds) -> StageNeeds:
        """Returns the needs of two stages together."""
        return StageNeeds(
            tasks=self.tasks or other.tasks,
            num_targets=max(self.num_targets, other.num_targets),
            whole_networks=self.whole_networks or other.whole_networks,
        )


class Stage(nn.Module, ABC):
    """One training stage: its registered parameters are trained; frozen parts that it uses are not registered.

    A trainer calls `setup` once, then for every step `forward`, backward, the optimiser and `after_step`.

    Attributes:
        name: The stage's name, and the key of its settings in the method's config.
        is_optional: Whether the generator works without the stage, so that `num_steps=0` may leave it out.
    """

    name: ClassVar[str]
    is_optional: ClassVar[bool] = False

    @property
    def parameter_use(self) -> ParameterUse:
        """Returns how `forward` reads the stage's parameters."""
        return "modules"

    @property
    @abstractmethod
    def config(self) -> StageConfig:
        """The stage's length, batch size and optimiser."""

    @property
    @abstractmethod
    def needs(self) -> StageNeeds:
        """Returns what the stage's batches must hold."""

    @property
    def bytes_per_value(self) -> float:
        """Returns about how many bytes a step keeps for each value of a whole network, at least.

        A run is refused before it begins where its stages that need whole networks would take more memory by this than
        there is. By default the stage keeps the values that it is given, and a gradient or another copy of them.
        """
        return 8.0

    @property
    def tokens(self) -> str:
        """The source of the tokens that batches hold in place of values.

        It is `none` for a stage whose batches hold values, `auto` for one whose trainer makes the tokens by the
        generator's `token_encoder`, or the path or URI of a corpus of tokens.
        """
        return "none"

    def setup(self, batches: Iterable[WeightBatch], seed: int) -> None:
        """Initialises the stage's parameters and buffers from data; one worker calls it and sends these to the others.

        Args:
            batches: Whole batches of all workers, as the stage sees them.
            seed: Seed of all that is drawn.
        """

    def windows(self, layout: Layout, noise: KeyedNoise) -> Windows | None:
        """Draws the window of each network that a step sees; None where the stage needs whole networks.

        A trainer calls it with the noise that `forward` then goes on with, and gives `forward` a batch that holds these
        windows alone. A stage must also take a batch of whole networks, of which it sees the same windows.
        """
        return None

    def see(self, batch: WeightBatch, noise: KeyedNoise) -> WeightBatch:
        """Returns a batch as the trainer would have given it, with windows only where these suffice."""
        if batch.windows is not None or (windows := self.windows(batch.layout, noise)) is None:
            return batch
        return batch.cut(windows)

    @abstractmethod
    def forward(self, batch: WeightBatch, noise: KeyedNoise) -> StageLoss:
        """Returns the loss of one batch, mean over its networks."""

    def num_tokens(self, batch: WeightBatch) -> int:
        """Returns how many tokens of a batch a step learns from, for rates; 0 where the stage knows no tokens."""
        return 0

    def after_step(self, all_reduce: AllReduce) -> None:
        """Runs after every optimiser step, for instance to update codebooks."""

    def state(self, all_reduce: AllReduce) -> dict[str, Tensor]:
        """Returns, to every worker, what a resumed run needs beside parameters and buffers."""
        return {}

    def set_state(self, state: dict[str, Tensor], batch_at: Callable[[int], WeightBatch]) -> None:
        """Restores the result of `state`, on any number of workers.

        Args:
            state: The state of all workers.
            batch_at: Returns this worker's part of the batch of a step, in windows where the step saw windows.
        """
