"""Fills any module with the weights that a trained generator writes for a task."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from raywgen.generation.best import candidates_request, generate_best
from raywgen.generation.classifier import Classifier, read_classifier
from raywgen.generation.conditions import make_condition
from raywgen.generation.filled import Filled, ModuleT
from raywgen.generation.head_names import HeadName
from raywgen.generation.heads import Drawn, choose_classifier
from raywgen.generation.hub import push_bundle
from raywgen.generation.judge import judge, remedies, warn_of_chance
from raywgen.generation.modules import UnknownLayoutWarning, adapt_weights, check_known, check_module
from raywgen.generation.statistics import with_new_statistics
from raywgen.generation.stored_names import by_stored_names
from raywgen.generation.warn_caller import warn_caller
from raywgen.generators import Generator, Sampling
from raywgen.nn.wrappers import unwrapped
from raywgen.tasks.encoders import FrozenEncoder
from raywgen.tasks.linear_reference import left_out_accuracy
from raywgen.tasks.preprocessing import InputForm
from raywgen.tasks.runnable import runnable
from raywgen.tasks.sentence_form import SentenceForm
from raywgen.tasks.standing import Standing, standing
from raywgen.tasks.user_data import ConditionError, UserData, read_data
from raywgen.weights import Condition, Layout, Normalizer

# Generators that adapt look at examples alone.
ADAPT_INSTRUCTION = "adapt"
_BEST_OF = 8
MOST_SAMPLES = 4096


class TrainedGenerator:
    """A generator ready for use; get one by `raywgen.load`.

    Attributes:
        generator: The generator itself.
        inputs: Preprocessing by which the images that it was trained on became samples; None without images.
        encoder: The frozen encoder of its condition; None where the condition holds the samples themselves.
        sentences: How sentences became samples of its tasks; None where they are of something else.
        folder: The bundle that it was loaded from; empty where it was not.

    Examples:
        >>> generator = raywgen.load("runs/mine", device="cpu")
        >>> module = torch.nn.Sequential(torch.nn.Linear(64, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
        >>> samples, labels = torch.rand(32, 64), torch.arange(32) % 2
        >>> module = generator.fill(module, instruction="Is the digit a 3?", data=(samples, labels), quiet=True)
        >>> module(samples).shape
        torch.Size([32, 2])
    """

    def __init__(
        self,
        generator: Generator,
        inputs: InputForm | None = None,
        encoder: FrozenEncoder | None = None,
        sentences: SentenceForm | None = None,
        folder: str = "",
    ) -> None:
        self.generator = generator
        self.inputs = inputs
        self.sentences = sentences
        self.encoder = None if encoder is None else encoder.to(generator.device)
        self.folder = folder

    def __repr__(self) -> str:
        sizes = sorted(layout.num_values for layout in self.generator.layouts)
        several = f"{len(sizes)} layouts of {sizes[0]:,} to {sizes[-1]:,} values"
        layouts = several if len(sizes) > 1 else f"networks of {sizes[0]:,} values"
        num_parameters = sum(parameter.numel() for parameter in self.generator.parameters())
        return f"TrainedGenerator({self.generator.method}, {num_parameters:,} parameters, {layouts}, on {self.device})"

    @property
    def device(self) -> torch.device:
        """The device that it generates on."""
        return self.generator.device

    def to(self, device: torch.device | str) -> Self:
        """Moves the generator and its encoder to a device, such as `cuda`, and returns itself."""
        self.generator.to(device)
        self.encoder = None if self.encoder is None else self.encoder.to(device)
        return self

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Push generator using huggingface_hub.",
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
    ) -> str:
        """Uploads the generator with a model card to the Hugging Face hub; `raywgen.load(repo_id)` loads it again.

        The arguments are those of `huggingface_hub.ModelHubMixin`. Needs `pip install 'raywgen[hub]'`.

        Args:
            repo_id: `owner/name`; the repository is made if there is none.
            commit_message: Message of the commit.
            private: Whether a new repository is private; by default as the owner has set it.
            token: Token of the hub; by default that of `hf auth login` or `HF_TOKEN`.
            branch: Branch that is pushed to; by default `main`.
            create_pr: Whether to open a pull request in place of pushing to the branch.

        Returns:
            Address of the commit.

        Raises:
            HubError: The generator was not loaded from a folder, or the hub refuses it; the message says why.
        """
        return push_bundle(
            self.generator, self.folder, repo_id, commit_message, private, token, branch=branch, create_pr=create_pr
        )

    def adapt(
        self,
        module: ModuleT,
        support: object,
        *,
        policy: str = "",
        temperature: float = 0.0,
        seed: int = 0,
        quiet: bool = False,
    ) -> ModuleT:
        """Writes weights for a new task into a module, without gradients, and returns it.

        Args:
            module: The module to fill. For a generator of heads it is a linear layer on the encoder's features, with as
                many outputs as the task has classes.
            support: Labelled examples of the task, in any form that `read_data` takes: inputs `(S, ...)` and integer
                labels `(S,)` from 0. Images as uint8 `(S, C, H, W)`, samples as the encoder takes them, or features.
            policy: Optimiser whose behaviour is wanted, or a part of its name that no other has, such as `sam`, for a
                generator that has learned several.
            temperature: Temperature of the noise that generation starts from.
            seed: Keys the noise.
            quiet: Whether to leave out the line that says what the network does on the examples.

        Raises:
            ConditionError: The examples do not fit what the generator was trained with, or the module.
            UnknownLayoutError: The module's layout is one that the generator was not trained on.

        Warns:
            ChanceWarning: The network answers the examples no better than chance.
        """
        data = read_data(support, self.inputs)
        check_module(module)
        network = by_stored_names(unwrapped(module))
        layout = self.generator.layout_of(network.state_dict())
        check_known(self.generator, layout)
        condition = make_condition(self.generator, ADAPT_INSTRUCTION, (self.features(data.x), data.labels), policy)
        runs, samples_SF = self._runnable(network, data)
        values_D = adapt_weights(self.generator, layout, condition, temperature, seed)
        on_samples = judge(runs, layout, values_D, samples_SF, data.labels)
        network.load_state_dict(layout.unflatten(values_D, counters=network.state_dict()), strict=True)
        name = type(unwrapped(module)).__name__
        if not quiet:
            _print(name, on_samples, 1)
        warn_of_chance(name, on_samples, remedies(self.generator, None, is_known=True, adapted=True))
        return module

    def classifier(
        self,
        support: object,
        *,
        head: HeadName = "best",
        policy: str = "",
        temperature: float = 0.0,
        seed: int = 0,
        quiet: bool = False,
    ) -> Classifier:
        """Makes a classifier of images for a new task, without gradients: the encoder with the best of several heads.

        The heads are the one that the generator writes, nearest class means, and ridge regression on the encoder's
        features or its last two blocks, which may be normalised by the examples. The best is the one with the lowest
        loss on the examples, each of which is judged by the head that is made from all others. Images whose ink and
        paper are the other way round than the encoder knows are inverted. At most 1,024 examples are used.

        Args:
            support: Labelled examples of the task, in any form that `read_data` takes, as for `adapt`.
            head: `best`, or one of `written`, `means`, `ridge`, `blocks`, `own-means` and `own-blocks`.
            policy: Optimiser whose behaviour the written head should have, for a generator that has learned several.
            temperature: Temperature of the noise that the written head starts from.
            seed: Keys the noise.
            quiet: Whether to leave out the lines that say what each head does on the examples.

        Raises:
            ConditionError: As `raywgen.generation.heads.choose_classifier`.

        Warns:
            ChanceWarning: The classifier answers the examples no better than chance.
        """
        drawn = Drawn(instruction=ADAPT_INSTRUCTION, policy=policy, temperature=temperature, seed=seed)
        data = read_data(support, self.inputs)
        made = choose_classifier(self.generator, self.encoder, self.inputs, data, head, drawn)
        if not quiet:
            print("\n".join(made.lines()), file=sys.stderr)
        if (on_samples := made.heads[made.kept].left_out) is not None:
            warn_of_chance("the classifier", on_samples, remedies(self.generator, None, is_known=True, adapted=True))
        return made

    def load_classifier(self, path: str | Path) -> Classifier:
        """Loads a classifier that `raywgen adapt` or `Classifier.save` wrote; errors as `read_classifier`."""
        return read_classifier(path, self.encoder, self.inputs, self.generator.data.num_features)

    def features(self, samples: Tensor) -> Tensor:
        """Returns samples `(S, F)` as a condition holds them: encoded, where the generator works on features."""
        samples = torch.as_tensor(samples).cpu()
        if samples.dtype == torch.uint8 and self.inputs is not None and samples.dim() == 4:
            samples = self.inputs.standardised(samples)
        flat_SF = samples.reshape(len(samples), -1)
        if self.encoder is None or flat_SF.shape[1] == self.generator.data.num_features:
            return flat_SF
        return self.encoder(flat_SF.float().to(self.generator.device)).cpu()

    def fill(
        self,
        module: ModuleT,
        *,
        instruction: str = "",
        data: object = None,
        best_of: int | None = None,
        temperature: float = 0.5,
        seed: int = 0,
        sampling: Sampling | Mapping[str, Any] | None = None,
        unlabelled: object = None,
        quiet: bool = False,
    ) -> ModuleT:
        """Writes weights for a task into a module and returns it; says in one line what it does on the samples.

        All arguments but `quiet` are those of `fill_with_report`, and so are errors and warnings.

        Args:
            module: The module to fill.
            instruction: The task in words.
            data: Labelled samples of the task.
            best_of: Networks written, of which the one with the lowest loss on `data` is kept.
            temperature: 0 writes the same network every time.
            seed: Seed of the noise.
            sampling: Settings of sampling of the generator's method, or some of them.
            unlabelled: Inputs from which the statistics of batch normalisation are estimated anew.
            quiet: Whether to leave out the line, which goes to standard error.
        """
        filled = self._filled(module, instruction, data, best_of, temperature, seed, sampling, unlabelled)
        if filled.on_samples is not None and not quiet:
            _print(type(unwrapped(module)).__name__, filled.on_samples, filled.best_of)
        return module

    def fill_with_report(
        self,
        module: ModuleT,
        *,
        instruction: str = "",
        data: object = None,
        best_of: int | None = None,
        temperature: float = 0.5,
        seed: int = 0,
        sampling: Sampling | Mapping[str, Any] | None = None,
        unlabelled: object = None,
    ) -> Filled[ModuleT]:
        """Writes weights for a task into a module, and reports how they do on the task's samples.

        Args:
            module: Any `nn.Module`; its architecture is what is filled, its values are replaced. It is run once on the
                samples, in their own shape or flat, before anything is generated. It may be of another dtype than the
                networks that the generator learned from, wrapped, have tied tensors, or be a model of transformers
                whose tensors have other names in its files. Of a model of PEFT its active adapter is filled.
            instruction: The task in words. For a generator trained on weights alone it is the network's name in its
                corpus, or empty.
            data: Labelled samples of the task, in any form that `read_data` takes, for instance inputs `(S, ...)` and
                integer labels `(S,)`; none for such a generator. Of more than 4,096 that many are used.
            best_of: Networks generated; the one with the lowest loss on `data` is kept. By default 8, without data 1.
            temperature: 0 writes the same network every time.
            seed: Seed of the noise.
            sampling: Settings of sampling of the generator's method, or a mapping of some of them; the others are as in
                its config.
            unlabelled: Inputs of the task, the more the better, from which the statistics of batch normalisation are
                estimated anew; those that the generator writes stay by default. A generator whose task-loss stage ran
                with `statistics=batch` needs them.

        Raises:
            ConditionError: Instruction, data and module do not fit each other or what the generator was trained with,
                or there is no data to choose a network by.
            ConfigError, SamplingError, GuidanceError: The generator does not take `sampling`.
            ValueError: `best_of` is below 1.
            WeightsError: The module has no tensors.

        Warns:
            UnknownLayoutWarning: The generator was never trained on this layout.
            ChanceWarning: The network answers the samples no better than chance.
        """
        return self._filled(module, instruction, data, best_of, temperature, seed, sampling, unlabelled)

    def _filled(
        self,
        module: ModuleT,
        instruction: str,
        data: object,
        best_of: int | None,
        temperature: float,
        seed: int,
        sampling: Sampling | Mapping[str, Any] | None,
        unlabelled: object,
    ) -> Filled[ModuleT]:
        check_module(module)
        network = by_stored_names(unwrapped(module))
        layout = self.generator.layout_of(network.state_dict())
        examples = None if data is None else read_data(data, self.inputs).at_most(MOST_SAMPLES)
        pair = None if examples is None else (self.features(examples.x), examples.labels)
        condition = make_condition(self.generator, instruction, pair)
        normalizer = self.estimate_normalizer(layout, network)
        resolved = self.generator.resolve_sampling(sampling)
        drawn = {"temperature": temperature, "seed": seed, "normalizer": normalizer, "sampling": resolved}
        inputs = None if unlabelled is None else read_data(unlabelled, self.inputs, needs_labels=False).x
        on_samples, num = None, 1
        if examples is None:
            values_D, log_prob = self._first(condition, layout, network, best_of, inputs, drawn)
        else:
            num = _BEST_OF if best_of is None else best_of
            runs, samples_SF = self._runnable(network, examples)
            best = generate_best(
                self.generator,
                condition,
                layout,
                runs,
                best_of=num,
                unlabelled=None if inputs is None else [inputs.reshape(len(inputs), -1).float()],
                samples_BSF=samples_SF.unsqueeze(0),
                **drawn,
            )
            values_D, log_prob = best.values_BD[0], _first_of(best.log_prob_B)
            on_samples = standing(
                best.logits_BSC[0], examples.labels, num, left_out_accuracy(samples_SF, examples.labels)
            )
        if normalizer is not None:
            self.warn(layout)
        network.load_state_dict(layout.unflatten(values_D, counters=network.state_dict()), strict=True)
        if on_samples is not None:
            remedy = remedies(self.generator, num, is_known=normalizer is None)
            warn_of_chance(type(unwrapped(module)).__name__, on_samples, remedy)
        return Filled(module=module, on_samples=on_samples, best_of=num, log_prob=log_prob, is_known=normalizer is None)

    def _runnable(self, module: nn.Module, data: UserData) -> tuple[nn.Module, Tensor]:
        """Returns a copy that takes flat inputs, and these inputs: features where there is an encoder, else samples."""
        candidates = [data.x, data.x.reshape(len(data.x), -1)]
        if self.encoder is not None:
            candidates = [self.features(data.x), *candidates]
        return runnable(module, candidates, int(data.labels.max()) + 1)

    @torch.no_grad()
    def _first(
        self,
        condition: Condition,
        layout: Layout,
        module: nn.Module,
        best_of: int | None,
        unlabelled: Tensor | None,
        drawn: dict[str, Any],
    ) -> tuple[Tensor, float | None]:
        """Generates a single network, and returns it with its log-probability."""
        if best_of not in (None, 1):
            raise ConditionError(f"best_of={best_of}: without data nothing says which network is best; leave it out")
        first = self.generator.generate(candidates_request(self.generator, condition, layout, **drawn)).cpu()
        values_1D = first.values_BD
        if unlabelled is not None:
            runs, inputs_SF = runnable(module, [unlabelled, unlabelled.reshape(len(unlabelled), -1)], 0)
            values_1D = with_new_statistics(runs, layout, values_1D, inputs_SF)
        return values_1D[0], _first_of(first.log_prob_B)

    def estimate_normalizer(self, layout: Layout, module: nn.Module) -> Normalizer | None:
        """Returns None for a layout that the generator was trained on, else a normaliser from the most similar ones."""
        if self.generator.knows(layout):
            return None
        return self.generator.estimate_normalizer(layout, layout.flatten(module.state_dict()))

    def warn(self, layout: Layout) -> None:
        """Warns that a layout was never trained on."""
        warn_caller(
            f"this generator was never trained on a layout of {layout.num_values:,} values like this one; judge the "
            "result on samples of yours before you use it",
            UnknownLayoutWarning,
        )


def _print(name: str, on_samples: Standing, best_of: int) -> None:
    chosen = f", the best of {best_of} by its loss on them" if best_of > 1 else ""
    print(f"{name} on your samples{chosen}: {on_samples.sentence()}", file=sys.stderr)


def _first_of(log_prob_B: Tensor | None) -> float | None:
    return None if log_prob_B is None else float(log_prob_B[0])
