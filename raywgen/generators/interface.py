"""The interface of every method: a generator; its stages are in `stage.py`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import reduce
from itertools import chain
from operator import or_
from typing import Any, ClassVar, Generic

import torch
from torch import Tensor, nn

from raywgen.config import merge_config
from raywgen.generators.pieces import GeneratedPiece, Piece
from raywgen.generators.reporting import Ablation, WeightCode
from raywgen.generators.settings import ConfigT_co, GeneratorConfig, Sampling, SamplingError
from raywgen.generators.stage import Stage, StageNeeds
from raywgen.generators.token_encoder import TokenEncoder
from raywgen.weights import (
    Condition,
    KeyedNoise,
    Layout,
    Normalizer,
    NormalizerTable,
    StateDict,
    normalizer_of_similar,
)


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
        num_features: F, values of one flattened sample that a condition reads.
        max_classes: Most classes a task may have.
        policies: Optimisers of the corpus' trajectories, which a condition may name.
        num_sample_values: Values of a whole sample, of which a condition reads the first F; 0 for F.
    """

    num_features: int
    max_classes: int
    policies: tuple[str, ...] = ()
    num_sample_values: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "policies", tuple(self.policies))

    @property
    def has_tasks(self) -> bool:
        """Whether there are tasks to condition on; without, samples have one class and one value, which say nothing."""
        return self.max_classes > 1 or self.num_features > 1


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

    def bytes_at_once(self, layout: Layout, sampling: Sampling, num: int) -> tuple[float, float]:
        """Returns about how much memory the least and the most take that is written at once; zeros where unknown.

        Args:
            layout: The layout.
            sampling: Complete settings of sampling.
            num: Networks that are generated at once.
        """
        return 0.0, 0.0

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

    @property
    def reads_parts(self) -> bool:
        """Whether it can write from the instruction alone, or from the samples alone."""
        return False

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
