"""A classifier of a user's images: a frozen encoder and a linear head, which a file beside a generator keeps.

Shape legend: S samples, E features, C classes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raywgen.files import write_text
from raywgen.nn.batch_norm import layers_with_statistics
from raywgen.tasks.encoders import FrozenEncoder
from raywgen.tasks.preprocessing import InputForm
from raywgen.tasks.standing import Standing
from raywgen.weights import WeightsError, load_state_dict, save_state_dict

_STATISTICS = "statistics."
_READS = ("blocks", "own_statistics", "inverted")


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """The part of a sample that a head reads, and the way it gets it.

    Attributes:
        inputs: How pixels become samples; None without images.
        encoder: The frozen encoder; None where samples are features already.
        num_features: Values of a sample that is features already.
        blocks: Whether the head reads the encoder's last blocks side by side, else its features.
        own_statistics: Whether the encoder's batch normalisation has the statistics of the task's own examples.
        fingerprint: That of the encoder, before its statistics were replaced; empty without one.
        inverted: Whether images are inverted first, because the encoder knows ink and paper the other way round.
    """

    inputs: InputForm | None
    encoder: FrozenEncoder | None
    num_features: int
    fingerprint: str = ""
    blocks: bool = False
    own_statistics: bool = False
    inverted: bool = False

    def encodes(self, samples: Tensor) -> bool:
        """Whether samples are encoded: there is an encoder, and they are not features already."""
        return self.encoder is not None and samples[0].numel() != self.num_features

    def samples(self, samples: Tensor) -> Tensor:
        """Returns images uint8 `(S, C, H, W)` or samples of any shape as the encoder takes them, float32 `(S, F)`."""
        if samples.dtype == torch.uint8 and self.inputs is not None and samples.dim() == 4:
            samples = self.inputs.standardised(samples)
        flat_SF = samples.reshape(len(samples), -1).float()
        if self.encoder is None or not self.encodes(flat_SF):
            return flat_SF
        if self.inverted:
            assert self.inputs is not None, "only images are inverted"
            flat_SF = self.inputs.inverted(flat_SF)
        return flat_SF.to(self.encoder.centre_E.device)

    def parts(self, samples: Tensor) -> list[Tensor]:
        """Returns what the head reads, float32 `(S, E)`, block after block.

        Args:
            samples: Images uint8 `(S, C, H, W)`, samples as the encoder takes them, or features.

        Raises:
            EncoderError: The encoder does not take them.
        """
        flat_SF = self.samples(torch.as_tensor(samples))
        if self.encoder is None or (not self.blocks and not self.encodes(flat_SF)):
            return [flat_SF]
        return self.encoder.last_blocks(flat_SF) if self.blocks else [self.encoder(flat_SF)]


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedHead:
    """One of the heads that a classifier was chosen from.

    Attributes:
        words: What it is.
        left_out: Its outputs on the examples, each by the head that was made from all others; None where a class has a
            single example.
        loss: The loss of these outputs by which heads are compared, nats, as `left_out_loss` measures it; None as well.
    """

    words: str
    left_out: Standing | None
    loss: float | None

    def figures(self) -> str:
        """Returns its accuracy and loss in words; empty where nothing was measured."""
        if self.left_out is None or self.loss is None:
            return ""
        return f": accuracy {self.left_out.accuracy:.2f}, loss {self.loss:.3f}"


class Classifier(nn.Module):
    """Maps images to logits `(S, C)`; get one by `raywgen.load(...).classifier(examples)`.

    Args:
        view: What the head reads.
        head: The head.
        classes: Name of each class, in the order of the outputs.
        kept: Name of the head among `heads`.
        heads: All heads that it was chosen from, by name.
    """

    def __init__(
        self,
        view: View,
        head: nn.Linear,
        classes: tuple[str, ...],
        kept: str = "",
        heads: Mapping[str, JudgedHead] | None = None,
    ) -> None:
        super().__init__()
        self.view, self.head, self.classes, self.kept = view, head, classes, kept
        self.heads = dict(heads or {})

    def forward(self, samples: Tensor) -> Tensor:
        """Returns the logits `(S, C)` of images uint8 `(S, C, H, W)`, standardised samples or features."""
        return self.head(torch.cat(self.view.parts(samples), dim=1).to(self.head.weight.device))

    def lines(self) -> list[str]:
        """Returns one line about each head that it was chosen from, and says which is kept."""
        first = "each example left out in turn:"
        if self.heads[self.kept].left_out is None:
            first = "a class has a single example, which cannot be left out, so nothing was measured:"
        inverted = ["images are inverted: their ink and paper are the other way round than the encoder knows"]
        kept = {name: "  <- kept" if name == self.kept else "" for name in self.heads}
        return [
            *(inverted if self.view.inverted else []),
            first,
            *(f"  {name} ({one.words}){one.figures()}{kept[name]}" for name, one in self.heads.items()),
        ]

    def save(self, path: str | Path, facts: Mapping[str, Any] | None = None) -> None:
        """Writes the head to a `.safetensors` file, and a `.json` beside it that says what it reads.

        A head on the encoder's features is a `weight` and a `bias`, as `nn.Linear` has them. Where the encoder has the
        statistics of the examples, they lie in the file, too; the encoder itself does not.

        Args:
            path: The `.safetensors` file.
            facts: Further content of the `.json` file.

        Raises:
            WeightsError: The file cannot be written.
        """
        state = {name: tensor.detach().cpu() for name, tensor in self.head.state_dict().items()}
        if self.view.own_statistics and self.view.encoder is not None:
            for name, layer in layers_with_statistics(self.view.encoder.module).items():
                state[f"{_STATISTICS}{name}.running_mean"] = layer.running_mean.cpu()  # pyright: ignore[reportOptionalMemberAccess]
                state[f"{_STATISTICS}{name}.running_var"] = layer.running_var.cpu()  # pyright: ignore[reportOptionalMemberAccess]
        save_state_dict(state, path, {"format": "pt"})
        reads: dict[str, Any] = {name: getattr(self.view, name) for name in _READS}
        reads |= {"classes": list(self.classes), "fingerprint": self.view.fingerprint}
        write_text(Path(path).with_suffix(".json"), json.dumps({**(facts or {}), **reads}, indent=1))


def read_classifier(
    path: str | Path, encoder: FrozenEncoder | None, inputs: InputForm | None, num_features: int
) -> Classifier:
    """Reads what `Classifier.save` wrote.

    Args:
        path: The `.safetensors` file; the `.json` beside it is read, too.
        encoder: The frozen encoder.
        inputs: How pixels become samples.
        num_features: Values of a sample that is features already.

    Raises:
        WeightsError: A file is missing or damaged, or is of another encoder.
    """
    state, facts = load_state_dict(path), Path(path).with_suffix(".json")
    try:
        stored = json.loads(facts.read_text())
        reads = {name: bool(stored[name]) for name in _READS}
        classes, fingerprint = tuple(map(str, stored["classes"])), str(stored["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{facts} does not say what {path} reads ({error!r}); write both by `raywgen adapt`"
        ) from error
    if fingerprint != ("" if encoder is None else encoder.fingerprint):
        raise WeightsError(f"{path} was written beside another encoder; load the generator that it was written by")
    statistics = {name.removeprefix(_STATISTICS): x for name, x in state.items() if name.startswith(_STATISTICS)}
    try:
        own = encoder.with_statistics(statistics) if encoder is not None and reads["own_statistics"] else encoder
        head = nn.Linear(state["weight"].shape[1], len(classes))
        head.load_state_dict({name: state[name] for name in ("weight", "bias")})
    except (RuntimeError, KeyError, IndexError) as error:
        raise WeightsError(f"{path} holds no such head ({error}); write it again by `raywgen adapt`") from error
    view = View(inputs=inputs, encoder=own, num_features=num_features, fingerprint=fingerprint, **reads)
    return Classifier(view, head, classes)
