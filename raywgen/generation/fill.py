"""The two lines of the README: load a generator, fill any module.

Shape legend: B networks (here 1), S samples, F features, D values.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from raywgen.generation.best import generate_best, generate_candidates, sampling_options
from raywgen.generation.statistics import with_new_statistics
from raywgen.generators import Generator
from raywgen.generators.bundle import ENCODER, BundleError, bundle_facts, load_bundle
from raywgen.generators.igpg import SamplingConfig
from raywgen.tasks.blank import blank_condition
from raywgen.tasks.encoders import FrozenEncoder, load_encoder
from raywgen.tasks.inputs import InputForm
from raywgen.trust import reading, trusting
from raywgen.weights import Condition, KeyedNoise, Layout, WeightReference

# Generators that adapt look at examples alone.
ADAPT_INSTRUCTION = "adapt"
_BEST_OF = 8
ModuleT = TypeVar("ModuleT", bound=nn.Module)


class ConditionError(ValueError):
    """Instruction or data that the generator cannot be told; the message names the remedy."""


class UnknownLayoutError(ValueError):
    """A layout that the generator cannot fill by adapting; the message says which it can."""


class UnknownLayoutWarning(UserWarning):
    """The generator fills a layout that it was never trained on."""


class TrainedGenerator:
    """A generator ready for use; get one by `raywgen.load`.

    Attributes:
        generator: The generator itself.
        inputs: How the images that it was trained on became samples; None where they were no images.
        encoder: The frozen encoder whose features it is told; None where it is told the samples themselves.
    """

    def __init__(
        self, generator: Generator, inputs: InputForm | None = None, encoder: FrozenEncoder | None = None
    ) -> None:
        self.generator = generator
        self.inputs = inputs
        self.encoder = encoder

    def adapt(
        self,
        module: ModuleT,
        support: tuple[Tensor, Tensor],
        *,
        policy: str = "",
        temperature: float = 0.0,
        seed: int = 0,
    ) -> ModuleT:
        """Writes weights for a new task into a module, without gradients, and returns it.

        Args:
            module: What to fill. For a generator of heads a linear layer on the encoder's features, with as many
                outputs as the task has classes.
            support: Labelled examples of the task: inputs `(S, ...)` and integer labels `(S,)` from 0. Images as
                uint8 `(S, C, H, W)`, samples as the encoder takes them, or features.
            policy: Optimiser whose behaviour is wanted, or a part of its name that no other has, such as `sam`; of a
                generator that has learned several.
            temperature: Of the noise that generation starts from.
            seed: Of the noise.

        Raises:
            ConditionError: The examples do not fit what the generator was trained with.
            UnknownLayoutError: The module's layout is one that the generator was not trained on.
        """
        layout = self.generator.layout_of(module.state_dict())
        told = (self.features(support[0]), support[1])
        condition = make_condition(self.generator, ADAPT_INSTRUCTION, told, policy)
        values_D = adapt_weights(self.generator, layout, condition, temperature, seed)
        module.load_state_dict(layout.unflatten(values_D, counters=module.state_dict()), strict=True)
        return module

    def features(self, samples: Tensor) -> Tensor:
        """Samples `(S, F)` as the generator is told them: encoded, where it works on features."""
        samples = torch.as_tensor(samples)
        if samples.dtype == torch.uint8 and self.inputs is not None and samples.dim() == 4:
            samples = self.inputs.standardised(samples)
        flat_SF = samples.reshape(len(samples), -1)
        if self.encoder is None or flat_SF.shape[1] == self.generator.data.num_features:
            return flat_SF
        return self.encoder(flat_SF.float())

    def fill(
        self,
        module: ModuleT,
        *,
        instruction: str = "",
        data: tuple[Tensor, Tensor] | None = None,
        best_of: int | None = None,
        temperature: float = 0.5,
        seed: int = 0,
        sampling: SamplingConfig | None = None,
        unlabelled: Tensor | None = None,
    ) -> ModuleT:
        """Writes weights for a task into a module and returns it.

        Args:
            module: Any `nn.Module`; its architecture is what is filled, its values are replaced.
            instruction: The task in words. Of a generator trained on weights alone the network's name in its corpus,
                or nothing.
            data: Labelled samples of the task: inputs `(S, ...)` and integer labels `(S,)`; none for such a generator.
            best_of: Networks written; the one with the lowest loss on `data` is kept. By default 8, without data 1.
            temperature: 0 writes the same network every time.
            seed: Of the noise.
            sampling: How tokens are drawn, of a generator that writes tokens.
            unlabelled: Inputs `(S, ...)` of the task, the more the better, from which the statistics of batch
                normalisation are estimated anew; those that the generator writes stay by default. A generator whose
                functional stage ran with `statistics=batch` needs them.

        Raises:
            ConditionError: Instruction or data do not fit what the generator was trained with, or there is no data to
                choose the best network by.
            SamplingError, GuidanceError: The generator does not fit `sampling`.
            ValueError: `best_of` is below 1.
            WeightsError: The module has no tensors.

        Warns:
            UnknownLayoutWarning: The generator was never trained on this layout; the log-probability per value
                is given beside that of a layout it knows.
        """
        layout = self.generator.layout_of(module.state_dict())
        condition = make_condition(self.generator, instruction, data)
        reference = self.guessed_reference(layout, module)
        drawn = {"temperature": temperature, "seed": seed, "reference": reference, "sampling": sampling}
        inputs = None if unlabelled is None else unlabelled.reshape(len(unlabelled), -1).float()
        if data is None:
            values_D, log_prob = self._first(condition, layout, module, best_of, inputs, drawn)
        else:
            best = generate_best(
                self.generator,
                condition,
                layout,
                module,
                best_of=_BEST_OF if best_of is None else best_of,
                unlabelled=None if inputs is None else [inputs],
                **drawn,
            )
            values_D, log_prob = best.values_BD[0], _first_of(best.log_prob_B)
        if reference is not None:
            self.warn(layout, log_prob, condition, temperature, seed, sampling)
        module.load_state_dict(layout.unflatten(values_D, counters=module.state_dict()), strict=True)
        return module

    def _first(
        self,
        condition: Condition,
        layout: Layout,
        module: nn.Module,
        best_of: int | None,
        unlabelled_SF: Tensor | None,
        drawn: dict[str, Any],
    ) -> tuple[Tensor, float | None]:
        """The first network that is written, and its log-probability."""
        if best_of not in (None, 1):
            raise ConditionError(f"best_of={best_of}: without data nothing says which network is best; leave it out")
        first = generate_candidates(self.generator, condition, layout, **drawn)
        values_1D = first.values_BD
        if unlabelled_SF is not None:
            values_1D = with_new_statistics(module, layout, values_1D, unlabelled_SF)
        return values_1D[0], _first_of(first.log_prob_B)

    def guessed_reference(self, layout: Layout, module: nn.Module) -> WeightReference | None:
        """None for a layout that the generator was trained on; else one from the layouts most like it."""
        if self.generator.knows(layout):
            return None
        return self.generator.guessed_reference(layout, layout.flatten(module.state_dict()))

    def warn(
        self,
        layout: Layout,
        log_prob: float | None,
        condition: Condition,
        temperature: float,
        seed: int,
        sampling: SamplingConfig | None,
    ) -> None:
        """Warns that a layout was never trained on, with the log-probability that says how far off it is."""
        condition = condition.first(1)
        told = f"this generator was never trained on a layout of {layout.num_values} values like this one"
        if log_prob is not None:
            known, reference = next(iter(self.generator.references.values()))
            noise = KeyedNoise(seed, torch.arange(1), 0)
            usual = self.generator.generate(
                condition,
                known,
                noise,
                temperature=temperature,
                reference=reference,
                **sampling_options(self.generator, sampling),
            )
            assert usual.log_prob_B is not None
            here = log_prob / layout.num_values
            there = float(usual.log_prob_B[0]) / known.num_values
            told += f": {here:.2f} nats per value, against {there:.2f} on a layout that it knows"
        warnings.warn(f"{told}; judge the result before you use it", UnknownLayoutWarning, stacklevel=3)


def _first_of(log_prob_B: Tensor | None) -> float | None:
    return None if log_prob_B is None else float(log_prob_B[0])


def adapt_weights(generator: Generator, layout: Layout, condition: Condition, temperature: float, seed: int) -> Tensor:
    """The flat vector `(D,)` of one network.

    Raises:
        UnknownLayoutError: The generator has no reference point for the layout.
    """
    if not generator.knows(layout):
        known = "; ".join(
            ", ".join(f"{spec.name} {list(spec.shape)}" for spec in other.generated[:3])
            for other, _ in generator.references.values()
        )
        raise UnknownLayoutError(
            f"the generator was never trained on a layout of {layout.num_values} values like this one; it knows {known}"
        )
    noise = KeyedNoise(seed, torch.arange(1), 0)
    return generator.generate(condition, layout, noise, temperature=temperature).values_BD[0]


def load(path: str | Path, *, trust: Sequence[str] = ()) -> TrainedGenerator:
    """Loads a generator from a run folder or a bundle.

    Args:
        path: The folder.
        trust: Packages from which its encoders may be imported, and addresses from which they may be fetched, such as
            `("mynets", "hf:openai/clip-vit-base-patch32")`. What it names beyond these is not touched.

    Raises:
        BundleError: There is none, or it is damaged.
        EncoderError: It works on features of an encoder that is not there.
        UntrustedError: It names an encoder that is not to be trusted.
    """
    folder = bundle_folder(path)
    with trusting(*trust):
        generator = load_bundle(folder)
        told = bundle_facts(folder).get("inputs")
        inputs = InputForm(**{**told, "mean": tuple(told["mean"]), "std": tuple(told["std"])}) if told else None
        kept = folder / ENCODER
        encoder = None
        if inputs is not None and inputs.encoder:
            with reading(str(folder), str(folder)):
                encoder = load_encoder(str(kept) if kept.is_dir() else inputs.encoder)
    return TrainedGenerator(generator, inputs, encoder)


def bundle_folder(path: str | Path) -> Path:
    """Where the bundle of a run folder lies; a bundle's own folder is one already.

    Raises:
        BundleError: There is none.
    """
    folder = Path(path)
    for candidate in (folder / "generator", folder):
        if (candidate / "generator.json").is_file():
            return candidate
    raise BundleError(f"{folder} holds no trained generator; train one by `raywgen train`, or wait until it is done")


def make_condition(
    generator: Generator, instruction: str, data: tuple[Tensor, Tensor] | None, policy: str = ""
) -> Condition:
    """One condition from what a user gives; data may be left out for a generator trained on weights alone, and must.

    Raises:
        ConditionError: The instruction is empty, samples and labels do not fit the generator's data, or the generator
            has learned no optimiser of that name, or several.
    """
    if not generator.data.knows_tasks:
        if data is not None:
            raise ConditionError(
                "this generator was trained on weights alone and can be told no data; leave data out, or describe its "
                "corpus by `raywgen corpus describe` and train anew"
            )
        return blank_condition(instruction)
    if data is None:
        raise ConditionError("data is missing: this generator writes for a task; give labelled samples of it")
    samples, labels = (torch.as_tensor(part) for part in data)
    if not instruction.strip():
        raise ConditionError("the instruction is empty; say in words what the network should do")
    if not samples.dim() or labels.dim() != 1:
        raise ConditionError(
            f"data holds samples {list(samples.shape)} and labels {list(labels.shape)}; "
            "give samples of shape [S, ...] and labels of shape [S]"
        )
    if len(samples) != len(labels) or not len(labels):
        raise ConditionError(f"data holds {len(samples)} samples and {len(labels)} labels; give one label per sample")
    samples_SF = samples.reshape(len(samples), -1).to(torch.float32)
    spec = generator.data
    if samples_SF.shape[1] != spec.num_features:
        raise ConditionError(
            f"a sample has {samples_SF.shape[1]} values, the generator was trained on {spec.num_features}; "
            "give data of the same form"
        )
    if not bool(samples_SF.isfinite().all()):
        raise ConditionError("data holds NaN or infinity; drop those samples")
    labels_S = labels.to(torch.int64)
    most = generator.max_classes
    if int(labels_S.min()) < 0 or (most is not None and int(labels_S.max()) >= most):
        raise ConditionError(f"labels must lie between 0 and {'any number' if most is None else most - 1}")
    return Condition(
        instructions=(instruction,),
        samples_BSF=samples_SF.unsqueeze(0),
        labels_BS=labels_S.unsqueeze(0),
        policies=(_known_policy(generator, policy),),
    )


def _known_policy(generator: Generator, told: str) -> str:
    """The one optimiser of that name, or with that part of a name."""
    names = generator.data.policies if generator.takes_policy else ()
    if not told or told in names:
        return told
    meant = [name for name in names if told in name]
    if len(meant) != 1:
        known = f"give one of {', '.join(names)}" if names else f"leave it out; '{generator.method}' learns none"
        raise ConditionError(f"policy={told}: {known}")
    return meant[0]
