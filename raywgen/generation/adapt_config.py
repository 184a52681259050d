"""Settings of the generation of weights from labelled examples, and what it reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from raywgen.generation.head_names import HeadName
from raywgen.nn.devices import Device
from raywgen.tasks.standing import Standing


@dataclass(kw_only=True)
class AdaptConfig:
    """Settings of the generation of weights from a new task's labelled examples.

    Attributes:
        generator: Run folder or bundle of a generator that was trained on such tasks.
        support: Labelled examples: a Parquet file, glob or `hf://` name of images with labels, a folder of class
            folders, an `.npz` file with arrays `x` (samples first) and `y`, or a Parquet file with such columns. For
            adapters of a text encoder a Parquet file with the columns `sentence` and `label`; for those of a causal
            language model `sentence` is enough.
        out: The `.safetensors` file to write; a `.json` beside it says what it is. For adapters of a text model the
            folder, as the PEFT library loads it.
        instruction: The task in words, for adapters of a text model; by default a question with the classes' names.
        test: Labelled sentences that nothing is chosen by, on which the adapter is judged, too; plain texts for a
            causal language model.
        reads: What a generator of adapters of a text model reads: `both`, the `instruction` or the `examples` alone,
            which it must have been trained for by `condition_dropout`. The head is fitted to the examples all the same.
        best_of: Adapters of a text model that are generated, of which that with the lowest loss on the examples is
            kept, for a text encoder each example left out in turn.
        head: For a generator of heads, which one is kept. `written` by the generator; nearest class `means`; `ridge`
            regression on the encoder's features, or on its last `blocks`; `own-means` and `own-blocks`, with the
            encoder's batch normalisation by the examples; or the `best` of all, by the loss on the examples, each of
            which is judged by the head that is made from all others.
        policy: Optimiser whose behaviour is wanted, or a part of its name that no other has, such as `sam`, for a
            generator that has learned several. A generator of heads needs `head=written` with it.
        temperature: Temperature of the noise that generation starts from; 0 generates the same network every time.
        seed: Keys the noise.
        device: `cpu`, `cuda`, or `auto`: a GPU where there is one.

    Examples:
        >>> raywgen.AdaptConfig(generator="runs/heads", support="examples.npz").out
        'adapted.safetensors'
    """

    generator: str = "runs/mcdi"
    support: str = ""
    out: str = "adapted.safetensors"
    instruction: str = ""
    test: str = ""
    reads: Literal["both", "instruction", "examples"] = "both"
    best_of: int = 1
    head: HeadName = "best"
    policy: str = ""
    temperature: float = 0.0
    seed: int = 0
    device: Device = "auto"

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature}: must be at least 0")
        if self.best_of < 1 or (self.best_of > 1 and self.temperature == 0):
            raise ValueError(
                f"best_of={self.best_of}: give 1, or more with a temperature above 0, at which they differ"
            )
        if not self.support:
            raise ValueError("support is empty: name the new task's labelled examples, for instance support=examples/")


@dataclass(frozen=True, slots=True, kw_only=True)
class NextWordLoss:
    """Next-word loss on some texts, nats a token, each text weighing the same.

    Attributes:
        adapted: That of the causal language model with the adapter.
        base: That of the model as it is.
    """

    adapted: float
    base: float

    def sentence(self) -> str:
        """Returns both in words."""
        return f"{self.adapted:.3f} nats a token with the adapter, {self.base:.3f} without"


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapted:
    """Facts about the generated weights.

    Attributes:
        path: The file that holds them.
        num_values: Number of values in it.
        classes: Names of the outputs, in order; none of a causal language model.
        num_examples: Number of labelled examples.
        encode_ms: Milliseconds that the encoder took; 0 without one.
        generate_ms: Milliseconds of generation alone; for heads of making, judging and choosing all of them.
        on_examples: Accuracy of the network on the examples, beside chance; None where nothing says how to build it.
            Heads are judged on each example by the head of all others, and None where a class has a single one.
        heads: For heads one line about each that was made, and which is kept.
        head_alone: The same of a head on the text encoder as it is; None for other networks.
        on_test: Accuracy of the network on the sentences of `test`; None without.
        head_alone_on_test: That of the head on the text encoder as it is.
        next_word: Next-word loss on the examples, which the generator has read; None but for causal language models.
        next_word_on_test: That on the texts of `test`; None without.
    """

    path: str
    num_values: int
    classes: tuple[str, ...]
    num_examples: int
    encode_ms: float
    generate_ms: float
    on_examples: Standing | None
    heads: tuple[str, ...]
    head_alone: Standing | None = None
    on_test: Standing | None = None
    head_alone_on_test: Standing | None = None
    next_word: NextWordLoss | None = None
    next_word_on_test: NextWordLoss | None = None
