"""The interface of every method: a generator, and the stages that train it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import reduce
from itertools import chain
from operator import or_
from typing import Any, ClassVar, Generic, Literal, NamedTuple

import torch
from torch import Tensor, nn

from raywgen.config import merge_config
from raywgen.generators.pieces import GeneratedPiece, Piece
from raywgen.generators.reporting import Ablation, WeightCode
from raywgen.generators.settings import ConfigT_co, GeneratorConfig, Sampling, SamplingError, StageConfig
from raywgen.generators.token_encoder import TokenEncoder
from raywgen.nn.quantisers import AllReduce
from raywgen.weights import (
    Condition,
    KeyedNoise,
    Layout,
    Normalizer,
    NormalizerTable,
    StateDict,
    WeightBatch,
    Windows,
    normalizer_of_similar,
)

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


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """The networks that a generator is asked for, and how it draws them; all tensors are on the generator's device.

    Attributes:
        condition: B conditions, one for each network.
        layout: The layout to fill.
        noise: B rows of keyed noise.
        temperature: Scale of the randomness; 0 is deterministic.
        normalizer: Base and scale for a layout that the generator was not trained on.
        sampling: Sampling settings; None for those of the generator's config.
    """

    condition: Condition
    layout: Layout
    noise: KeyedNoise
    temperature: float = 1.0
    normalizer: Normalizer | None = None
    sampling: Sampling | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """Networks that a generator wrote.

    Attributes:
        values_BD: Flat vectors, float32.
        log_prob_B: Log-probability of each in nats, or None where the method has no density.
    """

    values_BD: Tensor
    log_prob_B: Tensor | None

    def cpu(self) -> Generated:
        """Copies the networks to the CPU."""
        log_prob_B = None if self.log_prob_B is None else self.log_prob_B.cpu()
        return Generated(values_BD=self.values_BD.cpu(), log_prob_B=log_prob_B)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSpec:
    """The data that a generator's condition encoders take.

    Attributes:
        num_features: F, values of one flattened sample.
        max_classes: Most classes a task may have.
        policies: Optimisers of the corpus' trajectories, which a condition may name.
    """

    num_features: int
    max_classes: int
    policies: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "policies", tuple(self.policies))

    @property
    def has_tasks(self) -> bool:
        """Whether there are tasks to condition on; without tasks there is one class, which says nothing."""
        return self.max_classes > 1


class Generator(nn.Module, ABC, Generic[ConfigT_co]):
    """Turns conditions into weights.

    A method is a subclass, such as `class Flow(Generator[FlowConfig])`, and is built by these three arguments alone.

    Args:
        config: The method's settings, an instance of `Config`.
        normalizers: The layouts of the training corpus with their normalisers.
        data: The form of the samples of a condition.

    Attributes:
        method: The name that it is built by: a short one of the registry, or `package.module:Class`.
        Config: Dataclass of the method's settings, a subclass of `GeneratorConfig`.
        Sampling: Dataclass of the settings by which networks are drawn. A method that has some has a field `sampling`
            of this type in its config, too.
    """

    method: str = ""
    Config: ClassVar[type[GeneratorConfig]]
    Sampling: ClassVar[type[Sampling]] = Sampling
    config: ConfigT_co
    ablations: ClassVar[tuple[Ablation, ...]] = ()
    """Rows that evaluation shows beside the finished generator: the generator as it was after earlier stages."""

    def __init__(self, config: ConfigT_co, normalizers: NormalizerTable, data: DataSpec) -> None:
        super().__init__()
        self.config = config
        self.normalizers = {key: (layout, normalizer.copy()) for key, (layout, normalizer) in normalizers.items()}
        # Registered, so that they move to the generator's device with it.
        self._registered_normalizers = nn.ModuleList(normalizer for _, normalizer in self.normalizers.values())
        self.data = data

    @abstractmethod
    def all_stages(self) -> list[Stage]:
        """Returns every training stage, in order, including those that `num_steps=0` leaves out."""

    def stages(self) -> list[Stage]:
        """Returns the stages that are trained, in order."""
        return [stage for stage in self.all_stages() if stage.config.num_steps > 0]

    @property
    def device(self) -> torch.device:
        """The device of the generator's parameters, where its conditions and noise must be."""
        return next(chain(self.parameters(), self.buffers())).device

    @property
    def needs(self) -> StageNeeds:
        """Returns the needs of all stages together."""
        nothing = StageNeeds(tasks=False, whole_networks=False)
        return reduce(or_, (stage.needs for stage in self.stages()), nothing)

    @abstractmethod
    def generate(self, request: GenerationRequest) -> Generated:
        """Writes one network for each condition of the request."""

    def pieces(self, layout: Layout, sampling: Sampling, num: int, max_values: int) -> list[Piece]:
        """Cuts networks of a layout into pieces, which `generate_piece` writes; by default each network is one piece.

        Args:
            layout: The layout.
            sampling: Complete settings of sampling.
            num: Networks that are generated at once, each cut at the same places.
            max_values: Most values of a piece of one network. A method may have parts that it does not cut.
        """
        return [Piece(index=0, start=0, stop=layout.num_values)]

    def least_bytes(self, layout: Layout, sampling: Sampling, num: int) -> float:
        """Returns about how much memory it takes to write the least that is written at once; 0 where that is unknown.

        Args:
            layout: The layout.
            sampling: Complete settings of sampling.
            num: Networks that are generated at once.
        """
        return 0.0

    def generate_piece(self, request: GenerationRequest, piece: Piece, kept: Mapping[str, Tensor]) -> GeneratedPiece:
        """Writes one piece of the networks of a request: the same values as `generate`, bit for bit.

        Args:
            request: The request, with the sampling settings and as many networks as `pieces` was given.
            piece: One of the pieces.
            kept: The tensors that the pieces in `piece.needs` kept.
        """
        assert piece.num_values == request.layout.num_values, f"method '{self.method}' writes whole networks"
        generated = self.generate(request)
        log_prob_B = None if generated.log_prob_B is None else generated.log_prob_B.double()
        return GeneratedPiece(values_BX=generated.values_BD, log_prob_B=log_prob_B)

    def resolve_sampling(self, given: Sampling | Mapping[str, Any] | None) -> Sampling:
        """Returns complete sampling settings of the method's own type, checked against the generator.

        Args:
            given: Settings, or a mapping of some of them; any others are those of the generator's config.

        Raises:
            ConfigError: A name is unknown (the nearest right one is named), or a value is of the wrong type.
            SamplingError: The settings are of another method, or do not fit the generator.
        """
        default = getattr(self.config, "sampling", None) or self.Sampling()
        if given is None:
            return default
        if isinstance(given, Mapping):
            if given and not fields(self.Sampling):
                raise SamplingError(f"sampling: method '{self.method}' has no sampling settings; leave it out")
            given = merge_config(self.Sampling, [("sampling", dict(given))], base=default)
        if type(given) is not self.Sampling:  # Settings of every method are instances of the empty base.
            raise SamplingError(
                f"sampling: method '{self.method}' takes {self.Sampling.__name__}, not {type(given).__name__}; give "
                "that, a mapping of its settings, or leave it out"
            )
        if fields(self.Sampling):
            try:
                replace(self.config, sampling=given)
            except ValueError as error:
                raise SamplingError(f"sampling: {error}") from error
        return given

    def reconstruct(self, values_BD: Tensor, layout: Layout) -> Tensor:
        """Returns given weights `(B, D)` after encoding and decoding; a generator without a code keeps them."""
        return values_BD

    def weight_code(self) -> WeightCode | None:
        """Returns the discrete code that the generator stores weights in, for reports; None where it has none."""
        return None

    def token_encoder(self) -> TokenEncoder | None:
        """Returns the encoder by which tokens of weights are stored; None where the generator has no tokens."""
        return None

    def encoders(self) -> dict[str, str]:
        """Returns the names of frozen encoders, as `load_encoder` takes them, by their key in the config."""
        return {}

    @property
    def policies(self) -> tuple[str, ...]:
        """The optimisers of the corpus that a condition may name; none by default."""
        return ()

    @property
    def max_classes(self) -> int | None:
        """Most classes a task may have; None for any number."""
        return self.data.max_classes

    def knows(self, layout: Layout) -> bool:
        """Whether the generator was trained on a layout."""
        return layout.id in self.normalizers

    @property
    def layouts(self) -> list[Layout]:
        """The layouts of the training corpus."""
        return [layout for layout, _ in self.normalizers.values()]

    def layout_of(self, state: StateDict) -> Layout:
        """Returns the layout by which flat vectors are put into a network.

        An architecture that the generator knows keeps the order of its flat vector and its constants, whatever the
        order, dtypes, wrappers and ties of this network.
        """
        layout = Layout.from_state_dict(state)
        for known, _ in self.normalizers.values():
            # Of tied tensors, the training files may have stored another one.
            own = {name for name, spec in zip(known.plain_names, known.tensors, strict=True) if not spec.tied_to}
            rooted = layout.rooted_at(own)
            if rooted.id == known.id:
                return rooted.arranged_like(known)
        return layout

    def normalizer(self, layout: Layout, given: Normalizer | None = None) -> Normalizer:
        """Returns the layout's normaliser; `given` if the layout was not in the training corpus."""
        known = self.normalizers.get(layout.id)
        normalizer = given if known is None else known[1]
        assert normalizer is not None, f"no normaliser for layout {layout.id}"
        assert known is None or layout.has_order_of(known[0]), "arrange the layout like the known one"
        return normalizer

    def estimate_normalizer(self, layout: Layout, start_D: Tensor) -> Normalizer:
        """Estimates the normaliser of a layout that was not in the training corpus, from the layouts most like it.

        Args:
            layout: A layout that the generator was not trained on.
            start_D: The base, used if the known networks share their starts.
        """
        # A module without values is refused by whoever fills it, in words of its own.
        start_D = start_D if start_D.is_meta else start_D.to(self.device)
        return normalizer_of_similar(layout, self.normalizers, start_D)
